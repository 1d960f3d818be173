// File: kernels/soft_target/soft_target_kernels.cuh
//
// soft_target on a GPU, in one launch. Each row is worked on by a team: some lanes of a warp, a block, or a cluster of
// blocks, each of which has a part of the row's classes.
//
//     statistics   sums of exponentials, and the values of all forms but jsd; reads the logits
//     mixtures     the value of jsd
//     gradient
//
// A part is read in chunks of 16 bytes. All that fits into shared memory is on its way there from the beginning, and
// the first sweep waits for one quarter of it after another; the other sweeps take it from there. The rest is read
// again, from the L2 cache where that is large enough. A thread reads only the shared memory that it has filled itself,
// so no barrier is needed for that. Rows whose first class does not lie on a 16-byte boundary begin with an incomplete
// chunk, read element by element, and end with one; where the tensors' rows lie differently, all chunks are read so.
//
// The blocks of a cluster send each other their sums and wait for those of the others, once (jsd: twice). Nothing waits
// for the gradient's stores, and nobody reads a block's memory: a block that is done may go.
//
// Sums are formed in an order that depends on the shape, the dtype, the alignment and the device, not on time: the
// same bits every time.
#ifndef PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_KERNELS_CUH_
#define PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_KERNELS_CUH_

#include <cstddef>
#include <type_traits>

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

// Where the threads of a team meet: the warps of a block, then the blocks of a cluster.
template <class S>
struct Meeting {
  S warps[kMostWarps];
  S blocks[kMostParts];
};
// At the start of a block's shared memory.
template <class K>
struct Exchange {
  Meeting<Statistics<K>> statistics;
  Meeting<Sums> sums;
  gpu::Mailbox statistics_mail, sums_mail;
};

// Those of `lanes` neighbouring threads, joined; each gets them. `lanes`: a power of 2, of one warp.
template <class S>
PYKD_GPU S merge_lanes(const Setting& setting, S mine, int lanes) {
  PYKD_GPU_NO_UNROLL
  for (int mask = lanes / 2; mask > 0; mask /= 2) mine.merge(setting, mine.exchanged(mask));
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

// Those of a team's threads.
template <class S>
PYKD_GPU S merge_team(const Setting& setting, const Plan& plan, const S& mine, Meeting<S>& meeting,
                      gpu::Mailbox* mailbox) {
  if (plan.team <= gpu::kWarp) return merge_lanes(setting, mine, plan.team);
  const S all = merge_block(setting, mine, meeting.warps);
  const auto blocks = static_cast<unsigned>(plan.parts);
  if (blocks == 1) return all;
  const unsigned rank = gpu::block() % blocks;
  if (gpu::thread() < blocks) gpu::post(all, &meeting.blocks[rank], mailbox, gpu::thread());
  gpu::await_mail(mailbox);
  return merge_lanes(setting, meeting.blocks[gpu::thread() % blocks], plan.parts);
}

// What one team does with its part of a row. Chunks are counted from the part's first, `k`; a thread has those from
// `lane` on, in steps of the team.
template <class T, class K>
class Part {
 public:
  static constexpr int kLanes = T::kLanes;
  using Storage = typename T::Storage;

  PYKD_GPU Part(const Problem& problem, const Plan& plan, std::int64_t row, unsigned part, unsigned lane, bool present,
                unsigned char* stage)
      : setting_(problem.setting),
        student_(at(problem.student, row, problem.classes)),
        teacher_(at(problem.teacher, row, problem.classes)),
        label_probs_(at(problem.label_probs, row, problem.classes)),
        gradient_(const_cast<Storage*>(at(problem.gradient, row, problem.classes))),
        classes_(problem.classes),
        lane_(static_cast<int>(lane)),
        team_(plan.team),
        step_(plan.round_bytes),
        stage_(stage + gpu::thread() * kStep) {
    const int shift_of_student = shift_of(student_);
    const bool alike = (!K::kTeacher || shift_of(teacher_) == shift_of_student) &&
                       (label_probs_ == nullptr || shift_of(label_probs_) == shift_of_student) &&
                       (gradient_ == nullptr || shift_of(gradient_) == shift_of_student);
    const int shift = alike ? shift_of_student : 0;  // classes that the row's first chunk lacks
    const int first = static_cast<int>(part) * plan.chunks;
    const int rest = (classes_ + shift + kLanes - 1) / kLanes - first;
    count_ = rest < 0 || !present ? 0 : rest < plan.chunks ? rest : plan.chunks;
    first_column_ = first * kLanes - shift;
    const int end = alike && classes_ > first_column_ ? (classes_ - first_column_) / kLanes : 0;
    end_complete_ = end < count_ ? end : count_;
    first_complete_ = first_column_ < 0 ? 1 : 0;
    staged_ = plan.staged * team_ < count_ ? plan.staged * team_ : count_;
    quarter_ = (plan.staged + kQuarters - 1) / kQuarters * team_;
  }

  // Everything that fits, on its way into shared memory.
  PYKD_GPU void begin_copies() const {
    unsigned char* slot = stage_;
    int k = lane_;
    if (k < first_complete_) k = copy_elements(k, &slot);
    PYKD_GPU_NO_UNROLL
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      const int staged = end_of(quarter), end = column(staged < end_complete_ ? staged : end_complete_);
      int from = column(k);
      PYKD_GPU_NO_UNROLL
      for (; from < end; from += team_ * kLanes, k += team_, slot += step_) {
        gpu::copy_to_shared(slot, student_ + from);
        if constexpr (K::kTeacher) gpu::copy_to_shared(slot + 16, teacher_ + from);
      }
      gpu::commit();
    }
    PYKD_GPU_NO_UNROLL
    while (k < staged_) k = copy_elements(k, &slot);
  }

  PYKD_GPU Statistics<K> statistics() const {
    Statistics<K> result;
    each_chunk<true>([&](auto whole, int k, const gpu::Words& student, const gpu::Words& teacher) {
      float s[kLanes], t[kLanes] = {};
      T::unpack(student, s);
      if constexpr (K::kTeacher) T::unpack(teacher, t);
      result.add(setting_, T::greatest(student), K::kTeacher ? T::greatest(teacher) : 0.0f, s, t);
      if constexpr (K::kGeneral) {
        if (label_probs_ != nullptr) {
          float y[kLanes];
          T::unpack(read<whole>(label_probs_, k, 0.0f), y);
          result.add_labels(setting_, s, y);
        }
      }
    });
    return result;
  }

  PYKD_GPU Sums mixtures(const Row<K>& row) const {
    Sums sums;
    each_chunk<false>([&](auto, int, const gpu::Words& student, const gpu::Words& teacher) {
      float s[kLanes], t[kLanes];
      T::unpack(student, s);
      T::unpack(teacher, t);
      PYKD_GPU_UNROLL
      for (int i = 0; i < kLanes; ++i) row.add_mixture(sums, s[i], t[i]);
    });
    return sums;
  }

  // `label`: -1 where there is none in range.
  PYKD_GPU void gradient(const Row<K>& row, int label) const {
    if (row.soft_factor == 0.0f && row.hard_factor == 0.0f) {  // whatever the logits are
      const float nothing[kLanes] = {};
      PYKD_GPU_NO_UNROLL
      for (int k = lane_; k < count_; k += team_) write<false>(k, nothing);
    } else if (K::kTeacher && row.soft_factor != 0.0f) {
      gradient<K::kTeacher>(row, label);
    } else {
      gradient<false>(row, label);
    }
  }

 private:
  static constexpr int kQuarters = 4;
  static constexpr int kStep = K::kTeacher ? 32 : 16;  // bytes of shared memory for one round of one thread

  template <bool kSoft>
  PYKD_GPU float slope(const Row<K>& row, float s, float t) const {
    if constexpr (!kSoft) return row.hard_slope(s);
    float slope = row.soft_slope(s, t);
    if constexpr (K::kGeneral) {
      if (setting_.separate && row.hard_factor != 0.0f) slope += row.hard_slope(s);
    }
    return slope;
  }

  template <bool kSoft>
  PYKD_GPU void gradient(const Row<K>& row, int label) const {
    each_chunk<false>([&](auto whole, int k, const gpu::Words& student, const gpu::Words& teacher) {
      float s[kLanes], t[kLanes] = {}, g[kLanes];
      T::unpack(student, s);
      if constexpr (kSoft) T::unpack(teacher, t);
      PYKD_GPU_UNROLL
      for (int i = 0; i < kLanes; ++i) g[i] = slope<kSoft>(row, s[i], t[i]);
      if constexpr (K::kGeneral) {
        if (label_probs_ != nullptr && row.hard_factor != 0.0f) {
          float y[kLanes];
          T::unpack(read<whole>(label_probs_, k, 0.0f), y);
          PYKD_GPU_UNROLL
          for (int i = 0; i < kLanes; ++i) g[i] -= row.hard_factor * y[i];
        }
      }
      write<whole>(k, g);
    });
    // The label's class once more, by the thread that has just written it.
    const int at_label = label - first_column_;
    if (label >= 0 && at_label >= 0 && at_label / kLanes < count_ && at_label / kLanes % team_ == lane_ &&
        row.hard_factor != 0.0f) {
      const float s = T::widen(student_[label]), t = kSoft ? T::widen(teacher_[label]) : 0.0f;
      gradient_[label] = T::narrow(slope<kSoft>(row, s, t) - row.hard_factor);
    }
  }

  static PYKD_GPU const Storage* at(const void* tensor, std::int64_t row, std::int32_t classes) {
    return tensor == nullptr ? nullptr : static_cast<const Storage*>(tensor) + row * classes;
  }
  // How many elements after a 16-byte boundary it lies.
  static PYKD_GPU int shift_of(const Storage* p) {
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(p) / sizeof(Storage) % kLanes);
  }

  // An incomplete chunk; returns the next one.
  PYKD_GPU int copy_elements(int k, unsigned char** slot) const {
    if (k >= staged_) return k;
    gpu::store(*slot, read_elements(student_, k, -gpu::infinity()));
    if constexpr (K::kTeacher) gpu::store(*slot + 16, read_elements(teacher_, k, -gpu::infinity()));
    *slot += step_;
    return k + team_;
  }

  PYKD_GPU int column(int k) const { return first_column_ + k * kLanes; }
  PYKD_GPU bool complete(int k) const { return k >= first_complete_ && k < end_complete_; }
  // The staged chunks that are copied first, second and so on: before this one.
  PYKD_GPU int end_of(int quarter) const {
    const int end = (quarter + 1) * quarter_;
    return end < staged_ ? end : staged_;
  }

  // Classes that do not exist read as `outside`: -inf for logits, 0 for label_probs. Both add nothing to any sum.
  // kWhole: the chunk is known to be complete.
  template <bool kWhole>
  PYKD_GPU gpu::Words read(const Storage* row, int k, float outside) const {
    return kWhole || complete(k) ? gpu::load(row + column(k)) : read_elements(row, k, outside);
  }
  PYKD_GPU gpu::Words read_elements(const Storage* row, int k, float outside) const {
    const int first = column(k);
    float x[kLanes];
    PYKD_GPU_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      const bool exists = first + i >= 0 && first + i < classes_;
      x[i] = exists ? T::widen(row[first + i]) : outside;
    }
    return T::pack(x);
  }

  template <bool kWhole>
  PYKD_GPU void write(int k, const float (&g)[kLanes]) const {
    const int first = column(k);
    if (kWhole || complete(k)) {
      gpu::store_streaming(gradient_ + first, T::pack(g));
      return;
    }
    if constexpr (!kWhole) {
      PYKD_GPU_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        if (first + i >= 0 && first + i < classes_) gradient_[first + i] = T::narrow(g[i]);
      }
    }
  }

  // body(whole, k, student, teacher) for this thread's chunks: first for those that are complete and in shared memory,
  // then for the others. whole: std::true_type, std::false_type.
  template <bool kFirstSweep, class Body>
  PYKD_GPU void each_chunk(const Body& body) const {
    const unsigned char* slot = stage_;
    const bool begins_incomplete = lane_ < first_complete_;
    int k = lane_;
    if (begins_incomplete) {
      k += team_;
      slot += step_;
    }
    PYKD_GPU_NO_UNROLL
    for (int quarter = kFirstSweep ? 0 : kQuarters - 1; quarter < kQuarters; ++quarter) {
      if constexpr (kFirstSweep) wait_for(quarter);
      const int staged = kFirstSweep ? end_of(quarter) : staged_, end = staged < end_complete_ ? staged : end_complete_;
      PYKD_GPU_NO_UNROLL
      for (; k < end; k += team_, slot += step_) {
        const gpu::Words student = gpu::load(slot);
        body(std::true_type(), k, student, K::kTeacher ? gpu::load(slot + 16) : student);
      }
    }
    int next = k;
    if (begins_incomplete) k = lane_;
    PYKD_GPU_NO_UNROLL
    while (k < count_) {
      gpu::Words student, teacher;
      if (k < staged_) {
        const unsigned char* at = k == next ? slot : stage_;
        student = gpu::load(at);
        teacher = K::kTeacher ? gpu::load(at + 16) : student;
      } else {
        student = read<false>(student_, k, -gpu::infinity());
        teacher = K::kTeacher ? read<false>(teacher_, k, -gpu::infinity()) : student;
      }
      body(std::false_type(), k, student, teacher);
      if (k == next) {
        next += team_;
        slot += step_;
      }
      k = next;
    }
  }

  static PYKD_GPU void wait_for(int quarter) {
    switch (quarter) {
      case 0:
        return gpu::wait_for_all_but<3>();
      case 1:
        return gpu::wait_for_all_but<2>();
      case 2:
        return gpu::wait_for_all_but<1>();
      default:
        return gpu::wait_for_all_but<0>();
    }
  }

  const Setting& setting_;
  const Storage* student_;
  const Storage* teacher_;
  const Storage* label_probs_;
  Storage* gradient_;
  int classes_;
  int lane_, team_;
  int step_;  // bytes from one round to the next in shared memory
  unsigned char* stage_;
  int count_;                          // chunks of the part
  int staged_, quarter_;               // chunks that stay in shared memory; and that are copied together
  int first_column_;                   // below 0 where the row's first chunk is incomplete
  int first_complete_, end_complete_;  // chunks of which all classes exist and all tensors lie on a boundary
};

PYKD_GPU int label_of(const Problem& problem, std::int64_t row) {
  if (problem.labels == nullptr) return -1;
  const std::int64_t label = problem.labels[row];
  return label >= 0 && label < problem.classes ? static_cast<int>(label) : -1;
}

// Grid: blocks_of(plan, batch); clusters of plan.parts.
template <class T, int kForm, bool kGeneral>
PYKD_GPU_KERNEL(kMostThreads, 3)
rows_kernel(Problem problem, Plan plan) {
  using K = Kind<kForm, kGeneral>;
  static_assert(sizeof(Exchange<K>) <= kExchangeBytes);
  unsigned char* shared = gpu::shared_memory();
  auto& exchange = *reinterpret_cast<Exchange<K>*>(shared);
  const Setting& setting = problem.setting;
  const auto blocks = static_cast<unsigned>(plan.parts), team = static_cast<unsigned>(plan.team);
  const unsigned rank = gpu::block() % blocks;
  const bool shares_block = team <= gpu::kWarp;
  const unsigned lane = shares_block ? gpu::thread() & (team - 1) : gpu::thread();
  const std::int64_t own =
      shares_block ? static_cast<std::int64_t>(gpu::block()) * (gpu::threads() / team) + gpu::thread() / team
                   : gpu::block() / blocks;
  const bool present = own < problem.batch;
  const std::int64_t index = present ? own : 0;

  const Part<T, K> part(problem, plan, index, rank, lane, present, shared + kExchangeBytes);
  part.begin_copies();
  if (blocks > 1) {
    if (gpu::thread() == 0) {
      gpu::open_mailbox(&exchange.statistics_mail, blocks * sizeof(Statistics<K>));
      if constexpr (K::kMixture) gpu::open_mailbox(&exchange.sums_mail, blocks * sizeof(Sums));
    }
    gpu::announce_mailboxes();
  }
  Statistics<K> statistics = part.statistics();
  if (blocks > 1) gpu::await_mailboxes();
  statistics = merge_team(setting, plan, statistics, exchange.statistics, &exchange.statistics_mail);

  const int label = label_of(problem, index);
  Row<K> row(setting, statistics, problem.soft_weight == nullptr ? 0.0f : problem.soft_weight[index],
             problem.hard_weight == nullptr ? 0.0f : problem.hard_weight[index], problem.label_probs != nullptr);
  if (problem.labels != nullptr && label < 0 && row.hard_factor != 0.0f) row.hard_factor = gpu::nan();
  if constexpr (K::kMixture) {
    row.mixture = merge_team(setting, plan, part.mixtures(row), exchange.sums, &exchange.sums_mail);
  }
  if (problem.gradient != nullptr) {
    row.prepare_gradient();
    part.gradient(row, label);
  }

  if (!present || rank != 0 || lane != 0) return;
  if (K::kTeacher && problem.soft != nullptr) problem.soft[index] = row.soft_value();
  if (problem.hard == nullptr) return;
  if (problem.labels == nullptr) {
    problem.hard[index] = row.hard_value();
  } else if (label < 0) {
    problem.hard[index] = gpu::nan();
  } else {
    const auto* student = static_cast<const typename T::Storage*>(problem.student) + index * problem.classes;
    problem.hard[index] = row.hard_value_at(T::widen(student[label]));
  }
}

// use(kernel), with the kernel that a call needs.
template <class T, class Use>
auto with_kernel(const Problem& problem, const Use& use) {
  const bool general = problem.setting.separate || problem.label_probs != nullptr;
  const auto of_form = [&](auto form) {
    constexpr int kForm = decltype(form)::value;
    return general ? use(&rows_kernel<T, kForm, true>) : use(&rows_kernel<T, kForm, false>);
  };
  if (!problem.setting.soft) return of_form(std::integral_constant<int, kNoTeacher>());
  switch (problem.setting.form) {
    case Form::kReverseKl:
      return of_form(std::integral_constant<int, static_cast<int>(Form::kReverseKl)>());
    case Form::kSymmetricKl:
      return of_form(std::integral_constant<int, static_cast<int>(Form::kSymmetricKl)>());
    case Form::kJsd:
      return of_form(std::integral_constant<int, static_cast<int>(Form::kJsd)>());
    default:
      return of_form(std::integral_constant<int, static_cast<int>(Form::kKl)>());
  }
}

}  // namespace pykd::kernels::soft_target

#endif  // PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_KERNELS_CUH_
