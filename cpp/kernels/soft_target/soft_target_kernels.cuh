// File: kernels/soft_target/soft_target_kernels.cuh
//
// soft_target on a GPU. Each row is worked on by a team: one block, or a cluster of blocks, or (few rows, many
// classes) several blocks of three launches that meet in device memory. Every block has a part of the row's classes.
//
//     statistics   maxima and sums of exponentials; reads the logits
//     sweep        values, and where it needs none of them the gradient at once (cross_entropy, kl, hard)
//     sweep        the gradient, where it needs the value of KL(q || ...) first
//
// A part is read in chunks of 16 bytes. The first pass leaves as many of them as fit in shared memory, from where the
// other passes take them; the rest is read again, from the L2 cache where that is large enough. A thread reads only
// the shared memory that it has filled itself, so no barrier is needed for that. Rows whose first class does not lie
// on a 16-byte boundary begin with an incomplete chunk, read element by element, and end with one; where the tensors'
// rows lie differently, all chunks are read so.
//
// Sums are formed in an order that depends on the shape, the dtype, the alignment and the device, not on time: the
// same bits every time.
#ifndef PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_KERNELS_CUH_
#define PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_KERNELS_CUH_

#include <cstddef>

#include "kernels/cuda/gpu.cuh"
#include "kernels/soft_target/soft_target.h"
#include "kernels/soft_target/soft_target_math.cuh"
#include "kernels/soft_target/soft_target_plan.h"

namespace pykd::kernels::soft_target {

// One call. Pointers that are null: not given, or not wanted.
struct Problem {
  Setting setting;
  const void* student = nullptr;  // [batch, classes], like all tensors of the call's dtype
  const void* teacher = nullptr;
  const void* label_probs = nullptr;
  const std::int64_t* labels = nullptr;
  const float* soft_weight = nullptr;
  const float* hard_weight = nullptr;
  float* soft = nullptr;
  float* hard = nullptr;
  void* gradient = nullptr;
  std::int64_t batch = 0;
  std::int32_t classes = 0;
};

constexpr int kMostWarps = kMostThreads / gpu::kWarp;

// Where the threads of a team meet; at the start of a block's shared memory.
struct Exchange {
  Statistics warp_statistics[kMostWarps];
  Statistics statistics;
  Sums warp_sums[kMostWarps];
  Sums sums;
};
static_assert(sizeof(Exchange) <= kExchangeBytes);

// The statistics or sums of `lanes` neighbouring threads, joined; each gets them. `lanes`: a power of 2.
template <class S>
PYKD_GPU S merge_lanes(const Setting& setting, S mine, int lanes) {
  PYKD_GPU_NO_UNROLL
  for (int mask = lanes / 2; mask > 0; mask /= 2) mine.merge(setting, gpu::shuffle_xor(mine, mask));
  return mine;
}

// Those of the block's threads.
template <class S>
PYKD_GPU S merge_block(const Setting& setting, S mine, S* of_warps) {
  mine = merge_lanes(setting, mine, gpu::kWarp);
  const unsigned lane = gpu::thread() % gpu::kWarp;
  if (lane == 0) of_warps[gpu::thread() / gpu::kWarp] = mine;
  gpu::block_barrier();
  const unsigned warp = lane % kMostWarps;
  mine = S();
  if (warp < gpu::threads() / gpu::kWarp) mine = of_warps[warp];
  return merge_lanes(setting, mine, kMostWarps);
}

// Those of the threads of a cluster of 1, 2, 4 or 8 blocks.
template <class S>
PYKD_GPU S merge_cluster(const Setting& setting, const S& mine, S* of_warps, S* of_block, unsigned blocks) {
  const S all = merge_block(setting, mine, of_warps);
  if (blocks == 1) return all;
  if (gpu::thread() == 0) *of_block = all;
  gpu::cluster_barrier();
  return merge_lanes(setting, S(*gpu::of_cluster_block(of_block, gpu::thread() % blocks)), static_cast<int>(blocks));
}

// What one block does with its part of a row. Chunks are counted from the part's first, `k`.
template <class T>
class Part {
 public:
  static constexpr int kLanes = T::kLanes;
  using Storage = typename T::Storage;

  PYKD_GPU Part(const Problem& problem, const Plan& plan, std::int64_t row, unsigned part, unsigned char* stage)
      : setting_(problem.setting),
        student_(at(problem.student, row, problem.classes)),
        teacher_(at(problem.teacher, row, problem.classes)),
        label_probs_(at(problem.label_probs, row, problem.classes)),
        gradient_(const_cast<Storage*>(at(problem.gradient, row, problem.classes))),
        classes_(problem.classes),
        stage_(stage),
        staged_(plan.staged) {
    const int lane = lane_of(student_);
    const bool alike = (teacher_ == nullptr || lane_of(teacher_) == lane) &&
                       (label_probs_ == nullptr || lane_of(label_probs_) == lane) &&
                       (gradient_ == nullptr || lane_of(gradient_) == lane);
    const int shift = alike ? lane : 0;  // classes that the row's first chunk lacks
    const int first = static_cast<int>(part) * plan.chunks;
    const int rest = (classes_ + shift + kLanes - 1) / kLanes - first;
    count_ = rest < 0 ? 0 : rest < plan.chunks ? rest : plan.chunks;
    first_column_ = first * kLanes - shift;
    first_complete_ = first_column_ < 0 ? 1 : 0;
    end_complete_ = alike && classes_ > first_column_ ? (classes_ - first_column_) / kLanes : 0;
  }

  PYKD_GPU Statistics statistics() const {
    Statistics result;
    PYKD_GPU_NO_UNROLL
    for (int round = 0; round < kCopiesAhead; ++round) begin_copy(round);
    each_chunk<true>([&](int k, const Chunk& chunk) {
      float x[kLanes];
      T::unpack(chunk.student, x);
      result.add_student(setting_, x);
      if (teacher_ != nullptr) {
        T::unpack(chunk.teacher, x);
        result.add_teacher(setting_, x);
      }
      if (label_probs_ != nullptr) {
        T::unpack(read(label_probs_, k, 0.0f), x);
        result.add_label_probs(x);
      }
    });
    return result;
  }

  // Values and gradient of the part, either or both. `label`: -1 where there is none in range.
  PYKD_GPU Sums sweep(const Row& row, int label, bool values, bool gradient) const {
    Sums sums;
    each_chunk<false>([&](int k, const Chunk& chunk) {
      float s[kLanes], g[kLanes];
      T::unpack(chunk.student, s);
      if (teacher_ == nullptr || row.soft_factor == 0.0f) {
        PYKD_GPU_UNROLL
        for (int i = 0; i < kLanes; ++i) g[i] = 0.0f;
      }
      if (teacher_ != nullptr) {
        float t[kLanes];
        T::unpack(chunk.teacher, t);
        switch (setting_.form) {
          case Form::kCrossEntropy:
            soft<Form::kCrossEntropy>(row, s, t, values, gradient, sums, g);
            break;
          case Form::kKl:
            soft<Form::kKl>(row, s, t, values, gradient, sums, g);
            break;
          case Form::kReverseKl:
            soft<Form::kReverseKl>(row, s, t, values, gradient, sums, g);
            break;
          case Form::kSymmetricKl:
            soft<Form::kSymmetricKl>(row, s, t, values, gradient, sums, g);
            break;
          case Form::kJsd:
            soft<Form::kJsd>(row, s, t, values, gradient, sums, g);
            break;
        }
      }
      if (label_probs_ != nullptr) {
        float y[kLanes];
        T::unpack(read(label_probs_, k, 0.0f), y);
        if (values) {
          PYKD_GPU_UNROLL
          for (int i = 0; i < kLanes; ++i) row.add_hard(sums, y[i], s[i]);
        }
        if (gradient && row.hard_factor != 0.0f) {
          PYKD_GPU_UNROLL
          for (int i = 0; i < kLanes; ++i) g[i] += row.hard_factor * row.hard_slope(y[i], row.label_sum, s[i]);
        }
      } else if (gradient && row.hard_factor != 0.0f) {
        const int label_lane = label - column(k);
        PYKD_GPU_UNROLL
        for (int i = 0; i < kLanes; ++i) {
          g[i] += row.hard_factor * row.hard_slope(i == label_lane ? 1.0f : 0.0f, 1.0f, s[i]);
        }
      }
      if (gradient) write(k, g);
    });
    return sums;
  }

 private:
  struct Chunk {
    gpu::Words student, teacher;
  };

  static PYKD_GPU const Storage* at(const void* tensor, std::int64_t row, std::int32_t classes) {
    return tensor == nullptr ? nullptr : static_cast<const Storage*>(tensor) + row * classes;
  }
  // How many elements after a 16-byte boundary it lies.
  static PYKD_GPU int lane_of(const Storage* p) {
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(p) / sizeof(Storage) % kLanes);
  }

  PYKD_GPU int column(int k) const { return first_column_ + k * kLanes; }
  PYKD_GPU bool complete(int k) const { return k >= first_complete_ && k < end_complete_; }

  // Classes that do not exist read as `outside`: -inf for logits, 0 for label_probs. Both add nothing to any sum.
  PYKD_GPU gpu::Words read(const Storage* row, int k, float outside) const {
    const int first = column(k);
    if (complete(k)) return gpu::load(row + first);
    float x[kLanes];
    PYKD_GPU_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      const bool exists = first + i >= 0 && first + i < classes_;
      x[i] = exists ? T::widen(row[first + i]) : outside;
    }
    return T::pack(x);
  }

  PYKD_GPU void write(int k, const float (&g)[kLanes]) const {
    const int first = column(k);
    if (complete(k)) {
      gpu::store_streaming(gradient_ + first, T::pack(g));
      return;
    }
    PYKD_GPU_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (first + i >= 0 && first + i < classes_) gradient_[first + i] = T::narrow(g[i]);
    }
  }

  PYKD_GPU unsigned char* slot(int round, int tensor) const {
    const unsigned tensors = teacher_ == nullptr ? 1 : 2;
    return stage_ +
           ((static_cast<unsigned>(round) * tensors + static_cast<unsigned>(tensor)) * gpu::threads() + gpu::thread()) *
               16;
  }

  // A group of copies per round, empty where there is nothing to copy: the count of groups is that of rounds.
  PYKD_GPU void begin_copy(int round) const {
    const int k = round * static_cast<int>(gpu::threads()) + static_cast<int>(gpu::thread());
    if (round < staged_ && k < count_) {
      if (complete(k)) {
        gpu::copy_to_shared(slot(round, 0), student_ + column(k));
        if (teacher_ != nullptr) gpu::copy_to_shared(slot(round, 1), teacher_ + column(k));
      } else {
        gpu::store(slot(round, 0), read(student_, k, -gpu::infinity()));
        if (teacher_ != nullptr) gpu::store(slot(round, 1), read(teacher_, k, -gpu::infinity()));
      }
    }
    gpu::commit();
  }

  // body(k, chunk) for this thread's chunks.
  template <bool kFirstPass, class Body>
  PYKD_GPU void each_chunk(const Body& body) const {
    int round = 0;
    PYKD_GPU_NO_UNROLL
    for (int k = static_cast<int>(gpu::thread()); k < count_; k += static_cast<int>(gpu::threads()), ++round) {
      if constexpr (kFirstPass) {
        begin_copy(round + kCopiesAhead);
        gpu::wait_for_all_but<kCopiesAhead>();
      }
      Chunk chunk{};
      if (round < staged_) {
        chunk.student = gpu::load(slot(round, 0));
        if (teacher_ != nullptr) chunk.teacher = gpu::load(slot(round, 1));
      } else {
        chunk.student = read(student_, k, -gpu::infinity());
        if (teacher_ != nullptr) chunk.teacher = read(teacher_, k, -gpu::infinity());
      }
      body(k, chunk);
    }
  }

  template <Form kForm>
  PYKD_GPU void soft(const Row& row, const float (&s)[kLanes], const float (&t)[kLanes], bool values, bool gradient,
                     Sums& sums, float (&g)[kLanes]) const {
    float lp[kLanes], lq[kLanes], p[kLanes], q[kLanes];
    PYKD_GPU_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      lp[i] = row.log_p(t[i]);
      lq[i] = row.log_q(s[i]);
      p[i] = gpu::exp2(lp[i]);
      q[i] = gpu::exp2(lq[i]);
    }
    if (values) {
      PYKD_GPU_UNROLL
      for (int i = 0; i < kLanes; ++i) row.add_soft<kForm>(sums, lp[i], lq[i], p[i], q[i]);
    }
    if (gradient && row.soft_factor != 0.0f) {
      PYKD_GPU_UNROLL
      for (int i = 0; i < kLanes; ++i) g[i] = row.soft_factor * row.soft_slope<kForm>(lp[i], lq[i], p[i], q[i]);
    }
  }

  const Setting& setting_;
  const Storage* student_;
  const Storage* teacher_;
  const Storage* label_probs_;
  Storage* gradient_;
  int classes_;
  unsigned char* stage_;
  int staged_;                         // rounds (one chunk per thread) that stay in shared memory
  int count_;                          // chunks of the part
  int first_column_;                   // below 0 where the row's first chunk is incomplete
  int first_complete_, end_complete_;  // chunks of which all classes exist and all tensors lie on a boundary
};

// ---- What all kernels begin and end with -------------------------------------------------------------

PYKD_GPU int label_of(const Problem& problem, std::int64_t row) {
  if (problem.labels == nullptr) return -1;
  const std::int64_t label = problem.labels[row];
  return label >= 0 && label < problem.classes ? static_cast<int>(label) : -1;
}

PYKD_GPU Row make_row(const Problem& problem, const Statistics& statistics, std::int64_t index, int label) {
  Row row(problem.setting, statistics, problem.soft_weight == nullptr ? 0.0f : problem.soft_weight[index],
          problem.hard_weight == nullptr ? 0.0f : problem.hard_weight[index]);
  if (problem.labels != nullptr && label < 0 && row.hard_factor != 0.0f) row.hard_factor = gpu::nan();
  return row;
}

PYKD_GPU bool values_wanted(const Problem& problem) {
  return problem.soft != nullptr || (problem.hard != nullptr && problem.label_probs != nullptr);
}

template <class T>
PYKD_GPU void write_values(const Problem& problem, const Row& row, const Sums& sums, std::int64_t index, int label) {
  if (gpu::thread() != 0) return;
  if (problem.soft != nullptr) problem.soft[index] = row.soft_value(sums);
  if (problem.hard == nullptr) return;
  if (problem.labels == nullptr) {
    problem.hard[index] = row.hard_value(sums);
  } else if (label < 0) {
    problem.hard[index] = gpu::nan();
  } else {
    const auto* student = static_cast<const typename T::Storage*>(problem.student) + index * problem.classes;
    problem.hard[index] = row.hard_value_at(T::widen(student[label]));
  }
}

// ---- A row is one block's, or one cluster's ----------------------------------------------------------

// Grid: batch * plan.parts blocks; clusters of plan.parts.
template <class T>
PYKD_GPU_KERNEL(kMostThreads, 3)
rows_kernel(Problem problem, Plan plan) {
  unsigned char* shared = gpu::shared_memory();
  auto& exchange = *reinterpret_cast<Exchange*>(shared);
  const auto blocks = static_cast<unsigned>(plan.parts);
  const std::int64_t index = gpu::block() / blocks;
  const unsigned rank = gpu::block() % blocks;
  const Setting& setting = problem.setting;

  Part<T> part(problem, plan, index, rank, shared + kExchangeBytes);
  const Statistics statistics =
      merge_cluster(setting, part.statistics(), exchange.warp_statistics, &exchange.statistics, blocks);
  const int label = label_of(problem, index);
  Row row = make_row(problem, statistics, index, label);

  const bool gradient = problem.gradient != nullptr;
  const bool sums_first = gradient && slope_needs_sums(setting);
  const bool values = values_wanted(problem) || sums_first;
  Sums sums;
  if (values || gradient) sums = part.sweep(row, label, values, gradient && !sums_first);
  if (values) sums = merge_cluster(setting, sums, exchange.warp_sums, &exchange.sums, blocks);
  if (sums_first) {
    row.q_sum = sums.q;
    part.sweep(row, label, false, true);
  }
  if (rank == 0) write_values<T>(problem, row, sums, index, label);
  if (blocks > 1) gpu::cluster_barrier();  // a block's shared memory stays until the others have read it
}

// ---- A row is several independent blocks' ------------------------------------------------------------

// Between the launches: of every part of every row.
struct Scratch {
  Statistics* statistics;
  Sums* sums;
};

// What the parts of a row have left, joined by each block that asks.
template <class S>
PYKD_GPU S merge_parts(const Setting& setting, const S* parts, int count, S* of_warps) {
  S mine;
  for (int i = static_cast<int>(gpu::thread()); i < count; i += static_cast<int>(gpu::threads())) {
    mine.merge(setting, parts[i]);
  }
  return merge_block(setting, mine, of_warps);
}

// Grid of the first two: batch * plan.parts blocks. Of the third: the same where the gradient waits for the sums, else
// batch blocks.
template <class T>
PYKD_GPU_KERNEL(kMostThreads, 3)
parts_statistics_kernel(Problem problem, Plan plan, Scratch scratch) {
  auto& exchange = *reinterpret_cast<Exchange*>(gpu::shared_memory());
  const auto parts = static_cast<unsigned>(plan.parts);
  Part<T> part(problem, plan, gpu::block() / parts, gpu::block() % parts, nullptr);
  const Statistics statistics = merge_block(problem.setting, part.statistics(), exchange.warp_statistics);
  if (gpu::thread() == 0) scratch.statistics[gpu::block()] = statistics;
}

template <class T>
PYKD_GPU_KERNEL(kMostThreads, 3)
parts_sums_kernel(Problem problem, Plan plan, Scratch scratch) {
  auto& exchange = *reinterpret_cast<Exchange*>(gpu::shared_memory());
  const auto parts = static_cast<unsigned>(plan.parts);
  const std::int64_t index = gpu::block() / parts;
  const Statistics statistics =
      merge_parts(problem.setting, scratch.statistics + index * parts, plan.parts, exchange.warp_statistics);
  const int label = label_of(problem, index);
  const Row row = make_row(problem, statistics, index, label);
  const bool gradient = problem.gradient != nullptr && !slope_needs_sums(problem.setting);
  Part<T> part(problem, plan, index, gpu::block() % parts, nullptr);
  Sums sums = part.sweep(row, label, true, gradient);
  sums = merge_block(problem.setting, sums, exchange.warp_sums);
  if (gpu::thread() == 0) scratch.sums[gpu::block()] = sums;
}

template <class T>
PYKD_GPU_KERNEL(kMostThreads, 3)
parts_results_kernel(Problem problem, Plan plan, Scratch scratch) {
  auto& exchange = *reinterpret_cast<Exchange*>(gpu::shared_memory());
  const bool gradient = problem.gradient != nullptr && slope_needs_sums(problem.setting);
  const unsigned parts = gradient ? static_cast<unsigned>(plan.parts) : 1;
  const std::int64_t index = gpu::block() / parts;
  const Statistics statistics =
      merge_parts(problem.setting, scratch.statistics + index * plan.parts, plan.parts, exchange.warp_statistics);
  const Sums sums = merge_parts(problem.setting, scratch.sums + index * plan.parts, plan.parts, exchange.warp_sums);
  const int label = label_of(problem, index);
  Row row = make_row(problem, statistics, index, label);
  row.q_sum = sums.q;
  if (gradient) {
    Part<T> part(problem, plan, index, gpu::block() % parts, nullptr);
    part.sweep(row, label, false, true);
  }
  if (gpu::block() % parts == 0) write_values<T>(problem, row, sums, index, label);
}

}  // namespace pykd::kernels::soft_target

#endif  // PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_KERNELS_CUH_
