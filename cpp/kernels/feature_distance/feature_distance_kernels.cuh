// File: kernels/feature_distance/feature_distance_kernels.cuh
//
// feature_distance on a GPU. A cluster of blocks has the tokens of one row of the batch; in a block each warp has a
// token at a time, or all of them one that is long. A token is read from device memory once:
//
//     norms      leaves as much of the token in shared memory as fits
//     distance   and what the gradient needs of it
//     gradient
//
// A thread reads only the shared memory that it has filled itself. Sums run in float32 over a few hundred channels of a
// thread and in float64 beyond, in an order that depends on the shape, the dtype, the alignment and the device, not on
// time: the same bits every time.
#ifndef PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_KERNELS_CUH_
#define PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_KERNELS_CUH_

#include "kernels/cuda/gpu.cuh"
#include "kernels/feature_distance/feature_distance_directions.h"
#include "kernels/feature_distance/feature_distance_plan.h"

namespace pykd::kernels::feature {

// One call. Pointers that are null: not given, or not wanted.
struct Problem {
  const void* student = nullptr;  // [batch, tokens, channels], like all tensors of the call's dtype
  const void* teacher = nullptr;
  const float* weight = nullptr;
  float* value = nullptr;
  void* gradient = nullptr;
  std::int64_t batch = 0, tokens = 0, channels = 0;
};

constexpr int kMostWarps = kMostThreads / gpu::kWarp;
constexpr int kRun = 32;  // chunks that a thread sums in float32

// Two sums, which always travel together.
struct alignas(16) Two {
  double first = 0.0, second = 0.0;
  PYKD_GPU void add(const Two& other) {
    first += other.first;
    second += other.second;
  }
};

// Where the threads of a team meet; at the start of a block's shared memory.
struct Exchange {
  Two warps[kMostWarps];        // of one token
  Two blocks[gpu::kMostParts];  // distances of all tokens of each block of the cluster
  double workers[kMostWarps];   // of those of each warp
  gpu::Mailbox mail;
};
static_assert(sizeof(Exchange) <= kExchangeBytes);

// The sum over a team's threads; each gets it, the same bits. (x + y is y + x.)
PYKD_GPU Two sum_of_team(Two mine, int team, Exchange& exchange) {
  PYKD_GPU_NO_UNROLL
  for (int mask = gpu::kWarp / 2; mask > 0; mask /= 2) mine.add(gpu::shuffle_xor(mine, mask));
  if (team == gpu::kWarp) return mine;
  gpu::block_barrier();  // everyone has read what was there before
  if (gpu::thread() % gpu::kWarp == 0) exchange.warps[gpu::thread() / gpu::kWarp] = mine;
  gpu::block_barrier();
  Two all;
  PYKD_GPU_NO_UNROLL
  for (unsigned warp = 0; warp < gpu::threads() / gpu::kWarp; ++warp) all.add(exchange.warps[warp]);
  return all;
}

// One token, as one thread of its team sees it.
template <class T, Power power>
class Token {
 public:
  static constexpr int kLanes = T::kLanes;
  using Storage = typename T::Storage;

  PYKD_GPU Token(const Problem& problem, const Plan& plan, std::int64_t index, unsigned lane, unsigned char* stage)
      : student_(static_cast<const Storage*>(problem.student) + index * problem.channels),
        teacher_(static_cast<const Storage*>(problem.teacher) + index * problem.channels),
        gradient_(problem.gradient == nullptr ? nullptr
                                              : static_cast<Storage*>(problem.gradient) + index * problem.channels),
        channels_(problem.channels),
        lane_(static_cast<int>(lane)),
        team_(plan.team),
        staged_(plan.staged),
        stage_(stage + gpu::thread() * 32) {
    const int shift_of_student = shift_of(student_);
    const bool alike =
        shift_of(teacher_) == shift_of_student && (gradient_ == nullptr || shift_of(gradient_) == shift_of_student);
    shift_ = alike ? shift_of_student : 0;  // channels that the first chunk lacks
    count_ = static_cast<int>((channels_ + shift_ + kLanes - 1) / kLanes);
    first_complete_ = shift_ > 0 ? 1 : 0;
    end_complete_ = alike ? static_cast<int>((channels_ + shift_) / kLanes) : 0;
  }

  PYKD_GPU void write_zeros() const {
    const float nothing[kLanes] = {};
    PYKD_GPU_NO_UNROLL
    for (int k = lane_; k < count_; k += team_) write(k, nothing);
  }

  // The distance; writes the gradient where factor is given: d(loss) / d(distance).
  PYKD_GPU double distance(Exchange& exchange, bool gradient, float factor) const {
    Two squares = sum_of_team(squares_times<true>(1.0f, 1.0f), team_, exchange);
    if (!in_range(squares.first) || !in_range(squares.second)) {  // as rare as it is slow; all of the team agree
      const float x = range_multiplier(squares.first), y = range_multiplier(squares.second);
      const Two scaled = sum_of_team(squares_times<false>(x, y), team_, exchange);
      if (!in_range(squares.first)) squares.first = scaled.first / x / x;
      if (!in_range(squares.second)) squares.second = scaled.second / y / y;
    }
    const Directions directions(squares.first, squares.second);
    const float keep = directions.keep(), ratio = directions.ratio(), scale = directions.scale();

    const Two sums = sum_of_team(runs([&](float x, float y, float& value, float& along) {
                                   const float kept = gpu::product(x, keep);
                                   const float difference = gpu::product(gpu::fma(-y, ratio, kept), scale);
                                   const float size = difference < 0.0f ? -difference : difference;
                                   value = power != kL1 ? gpu::fma(difference, difference, value) : value + size;
                                   along = gpu::fma(gpu::product(kept, scale), slope(difference), along);
                                 }),
                                 team_, exchange);
    if (!gradient) return distance_of<power>(sums.first, directions);
    if (turns_nowhere(directions, channels_ == 1, sums.second)) {
      write_zeros();
      return distance_of<power>(sums.first, directions);
    }
    const auto along = static_cast<float>(sums.second);
    const auto result_scale = static_cast<float>(static_cast<double>(factor) * directions.x_reciprocal());
    each_chunk<false>([&](int k, const float(&x)[kLanes], const float(&y)[kLanes]) {
      float g[kLanes];
      PYKD_GPU_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        const float kept = gpu::product(x[i], keep);
        const float across = slope(gpu::product(gpu::fma(-y[i], ratio, kept), scale));
        g[i] = gpu::product(result_scale, gpu::fma(-gpu::product(kept, scale), along, across));
      }
      write(k, g);
    });
    return distance_of<power>(sums.first, directions);
  }

 private:
  // d |difference|^power / d difference, up to the factor 2 of l2.
  static PYKD_GPU float slope(float difference) {
    if (power != kL1) return difference;
    return difference > 0.0f ? 1.0f : difference < 0.0f ? -1.0f : difference;  // 0 and NaN stay
  }

  // How many elements after a 16-byte boundary it lies.
  static PYKD_GPU int shift_of(const Storage* p) {
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(p) / sizeof(Storage) % kLanes);
  }
  PYKD_GPU std::int64_t column(int k) const { return static_cast<std::int64_t>(k) * kLanes - shift_; }
  PYKD_GPU bool complete(int k) const { return k >= first_complete_ && k < end_complete_; }

  // Channels that do not exist read as 0.
  PYKD_GPU gpu::Words read(const Storage* token, int k) const {
    const std::int64_t first = column(k);
    if (complete(k)) return gpu::load(token + first);
    float x[kLanes];
    PYKD_GPU_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      x[i] = first + i >= 0 && first + i < channels_ ? T::widen(token[first + i]) : 0.0f;
    }
    return T::pack(x);
  }

  PYKD_GPU void write(int k, const float (&g)[kLanes]) const {
    const std::int64_t first = column(k);
    if (complete(k)) {
      gpu::store_streaming(gradient_ + first, T::pack(g));
      return;
    }
    PYKD_GPU_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (first + i >= 0 && first + i < channels_) gradient_[first + i] = T::narrow(g[i]);
    }
  }

  // body(k, x, y) for this thread's chunks. The first sweep fills shared memory.
  template <bool kFirstSweep, class Body>
  PYKD_GPU void each_chunk(const Body& body) const {
    unsigned char* slot = stage_;
    int round = 0;
    PYKD_GPU_NO_UNROLL
    for (int k = lane_; k < count_; k += team_, ++round, slot += gpu::threads() * 32) {
      const bool staged = round < staged_;
      const bool there = staged && !kFirstSweep;
      const gpu::Words student = there ? gpu::load(slot) : read(student_, k);
      const gpu::Words teacher = there ? gpu::load(slot + 16) : read(teacher_, k);
      if (staged && kFirstSweep) {
        gpu::store(slot, student);
        gpu::store(slot + 16, teacher);
      }
      float x[kLanes], y[kLanes];
      T::unpack(student, x);
      T::unpack(teacher, y);
      body(k, x, y);
    }
  }

  // Two sums over this thread's channels, add(x, y, first, second) of each.
  template <bool kFirstSweep, class Add>
  PYKD_GPU Two sums(const Add& add) const {
    Two result;
    float first = 0.0f, second = 0.0f;
    int run = 0;
    each_chunk<kFirstSweep>([&](int, const float(&x)[kLanes], const float(&y)[kLanes]) {
      PYKD_GPU_UNROLL
      for (int i = 0; i < kLanes; ++i) add(x[i], y[i], first, second);
      if (++run == kRun) {
        result.add({static_cast<double>(first), static_cast<double>(second)});
        first = second = 0.0f;
        run = 0;
      }
    });
    result.add({static_cast<double>(first), static_cast<double>(second)});
    return result;
  }
  template <class Add>
  PYKD_GPU Two runs(const Add& add) const {
    return sums<false>(add);
  }

  // The squares of the entries times x_multiplier and y_multiplier.
  template <bool kFirstSweep>
  PYKD_GPU Two squares_times(float x_multiplier, float y_multiplier) const {
    return sums<kFirstSweep>([&](float x, float y, float& x_squares, float& y_squares) {
      if constexpr (!kFirstSweep) {
        x = gpu::product(x, x_multiplier);
        y = gpu::product(y, y_multiplier);
      }
      x_squares = gpu::fma(x, x, x_squares);
      y_squares = gpu::fma(y, y, y_squares);
    });
  }

  const Storage* student_;
  const Storage* teacher_;
  Storage* gradient_;
  std::int64_t channels_;
  int lane_, team_, staged_;
  unsigned char* stage_;
  int shift_, count_;                  // of the first chunk; chunks
  int first_complete_, end_complete_;  // chunks of which all channels exist and all tensors lie on a boundary
};

// Grid: batch * plan.parts blocks; clusters of plan.parts.
template <class T, Power power>
PYKD_GPU_KERNEL(kMostThreads, 3)
tokens_kernel(Problem problem, Plan plan) {
  unsigned char* shared = gpu::shared_memory();
  auto& exchange = *reinterpret_cast<Exchange*>(shared);
  const auto blocks = static_cast<unsigned>(plan.parts), team = static_cast<unsigned>(plan.team);
  const std::int64_t row = gpu::block() / blocks;
  const unsigned rank = gpu::block() % blocks;
  const bool shared_value = problem.value != nullptr && blocks > 1;
  if (shared_value) {
    if (rank == 0 && gpu::thread() == 0) gpu::open_mailbox(&exchange.mail, blocks * sizeof(Two));
    gpu::announce_mailboxes();
  }

  const float weight = problem.gradient == nullptr ? 0.0f : problem.weight[row];
  const float factor = (power == kL2 ? 2.0f : 1.0f) * weight / static_cast<float>(problem.tokens);
  const unsigned lane = gpu::thread() % team, worker = gpu::thread() / team, workers = gpu::threads() / team;
  const std::int64_t begin = rank * plan.tokens, rest = problem.tokens - begin;
  const std::int64_t count = rest < plan.tokens ? rest : plan.tokens;
  double sum = 0.0;
  PYKD_GPU_NO_UNROLL
  for (std::int64_t i = worker; i < count; i += workers) {
    const Token<T, power> token(problem, plan, row * problem.tokens + begin + i, lane, shared + kExchangeBytes);
    if (problem.gradient != nullptr && weight == 0.0f) token.write_zeros();
    if (problem.value != nullptr || weight != 0.0f) sum += token.distance(exchange, weight != 0.0f, factor);
  }
  if (problem.value == nullptr) return;

  // The mean over the tokens: of a block's warps, then of the cluster's blocks.
  if (lane == 0) exchange.workers[worker] = sum;
  gpu::block_barrier();
  Two all;
  for (unsigned i = 0; i < workers; ++i) all.first += exchange.workers[i];
  if (shared_value) {
    gpu::await_mailboxes();
    if (gpu::thread() == 0) gpu::post(all, &exchange.blocks[rank], &exchange.mail, 0);
    if (rank != 0) return;
    gpu::await_mail(&exchange.mail);
    all = Two();
    for (unsigned i = 0; i < blocks; ++i) all.add(exchange.blocks[i]);
  }
  if (gpu::thread() == 0) problem.value[row] = static_cast<float>(all.first / static_cast<double>(problem.tokens));
}

}  // namespace pykd::kernels::feature

#endif  // PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_KERNELS_CUH_
