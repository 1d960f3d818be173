// File: pykd/schedules.hpp
//
// Temperatures and weights that change while a student learns: numbers by the step, for the parameters of a loss.
//
//     const pykd::Schedules schedules = {{"logit_temperature", pykd::cosine(4, 1, 10000)},
//                                        {"aux_weight", pykd::warm_up(pykd::linear(1, 0.1, 9000), 1000)}};
//     loss.value_and_gradient(tensors, pykd::at(schedules, step));
//
// The same numbers as pykd.schedules in Python. A schedule is a function of the step, which counts from 0; copies and
// threads may share it. A wrong number, or an empty function, is a pykd::Error. Loss::parameters() lists the names.
#ifndef PYKD_SCHEDULES_HPP_
#define PYKD_SCHEDULES_HPP_

#include <charconv>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <utility>

#include "pykd/pykd.hpp"

namespace pykd {

using Schedule = std::function<double(double step)>;
using Schedules = std::map<std::string, Schedule>;  // by parameter name

namespace internal {
[[noreturn]] inline void wrong_number(const char* name, const char* expected, double number) {
  char digits[32];  // with a point in every locale
  char* end = std::to_chars(digits, digits + sizeof digits, number, std::chars_format::general, 6).ptr;
  throw Error(PYKD_INVALID_VALUE, std::string("expected ") + name + " to be " + expected + ", got " +
                                      std::string(digits, end) + "; pass another");
}
inline void finite(const char* name, double number) {
  if (!std::isfinite(number)) wrong_number(name, "a finite number", number);
}
inline void positive(const char* name, double number) {
  finite(name, number);
  if (!(number > 0)) wrong_number(name, "a number greater than 0", number);
}
inline void callable(const std::string& name, const Schedule& schedule) {
  if (schedule) return;
  throw Error(PYKD_INVALID_VALUE, "expected " + name +
                                      " to be a function of the step, got an empty one; pass one, "
                                      "such as pykd::constant(1)");
}
// How much of `steps` is behind: from 0 to 1.
inline double progress(double step, double steps) { return std::fmin(std::fmax(step / steps, 0.0), 1.0); }
}  // namespace internal

// The same number always.
inline Schedule constant(double value) {
  internal::finite("value", value);
  return [value](double) { return value; };
}

// In a straight line from `start` at step 0 to `end` at `steps`, and `end` from there on.
inline Schedule linear(double start, double end, double steps) {
  internal::finite("start", start), internal::finite("end", end), internal::positive("steps", steps);
  // The end itself: the sum may be beside it by a rounding.
  return [=](double step) { return step >= steps ? end : start + (end - start) * internal::progress(step, steps); };
}

// Along half a wave of the cosine, slow at both ends and fast in between: end + (start - end) (1 + cos(pi step /
// steps)) / 2, and `end` from `steps` on.
inline Schedule cosine(double start, double end, double steps) {
  internal::finite("start", start), internal::finite("end", end), internal::positive("steps", steps);
  return [=](double step) {
    constexpr double kPi = 3.141592653589793;
    return end + (start - end) * (1 + std::cos(kPi * internal::progress(step, steps))) / 2;
  };
}

// In a straight line from `start` to where `schedule` begins, in `steps` steps; then `schedule`, from its step 0. A
// temperature needs a `start` above 0.
inline Schedule warm_up(Schedule schedule, double steps, double start = 0) {
  internal::callable("schedule", schedule), internal::finite("start", start), internal::positive("steps", steps);
  return [=, schedule = std::move(schedule)](double step) {
    if (step >= steps) return schedule(step - steps);
    return start + (schedule(0) - start) * internal::progress(step, steps);
  };
}

// The parameters of a call at a step.
inline Parameters at(const Schedules& schedules, double step) {
  internal::finite("step", step);
  Parameters numbers;
  for (const auto& [name, schedule] : schedules) {
    internal::callable("the schedule of " + name, schedule);
    numbers[name] = schedule(step);
  }
  return numbers;
}

}  // namespace pykd

#endif  // PYKD_SCHEDULES_HPP_
