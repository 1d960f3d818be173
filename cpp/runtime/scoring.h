// File: runtime/scoring.h
//
// Scores of rows: a run of a loss whose bad rows are told from the others and kept out, in place of an error.
#ifndef PYKD_RUNTIME_SCORING_H_
#define PYKD_RUNTIME_SCORING_H_

#include <cstddef>
#include <cstdint>

#include "pykd/pykd.h"
#include "runtime/loss.h"

namespace pykd::internal {

// As pykd_score() documents. `status` and `summary` may be nullptr; where it throws, nothing has been added to the
// summary.
void score_rows(const Loss& loss, const pykd_tensor* inputs, std::size_t num_inputs, const pykd_parameter* parameters,
                std::size_t num_parameters, const pykd_tensor* outputs, std::size_t num_outputs, std::uint8_t* status,
                pykd_score_summary* summary);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_SCORING_H_
