// soft_target for CUDA without a GPU: its kernels run on an emulated one (kernels/cuda/gpu_emulation.h) and are
// compared with the formulas in float64, in every layout that the launcher can choose; and that choice is tested as the
// arithmetic it is.
//
// What this cannot show: the hardware's own exp2 and log2, real clusters and copies, speed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/soft_target/soft_target_kernels.cuh"
#include "tests/emulated.h"

namespace pykd::kernels::soft_target {
namespace {

using emulated::expect_near;
using emulated::half_unit;
using emulated::kInf;
using emulated::kNan;
using emulated::rounded;
using emulated::Tensor;
using emulated::Values;

constexpr Form kForms[] = {Form::kCrossEntropy, Form::kKl, Form::kReverseKl, Form::kSymmetricKl, Form::kJsd};

// ---- The formulas, in float64 --------------------------------------------------------------------------

struct Case {
  std::int64_t batch = 3;
  int classes = 10;
  std::optional<Form> form = Form::kCrossEntropy;  // none: without a teacher
  bool labels = false, label_probs = false;
  bool soft_weights = true, hard_weights = true;
  float temperature = 2.0f, beta = 0.3f;
  bool soften_student = true;
  Values student, teacher, probs;   // [batch, classes]
  Values soft_weight, hard_weight;  // [batch]
  std::vector<std::int64_t> label;  // [batch]
};

struct Result {
  Values soft, hard, gradient;
};

Values log_softmax(const double* x, int classes, double scale) {
  double top = -kInf, sum = 0.0;
  for (int i = 0; i < classes; ++i) top = std::isnan(x[i]) ? kNan : std::fmax(top, x[i] * scale);
  for (int i = 0; i < classes; ++i) sum += std::exp(x[i] * scale - top);
  Values result;
  for (int i = 0; i < classes; ++i) result.push_back(x[i] * scale - top - std::log(sum));
  return result;
}

double times(double weight, double x) { return weight == 0.0 ? 0.0 : weight * x; }

Result expected(const Case& c) {
  Result result;
  const int n = c.classes;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    Values gradient(n, 0.0);
    const double* s = &c.student[b * n];
    if (c.form) {
      const double slope = c.soften_student ? 1.0 / c.temperature : 1.0;
      const Values lq = log_softmax(s, n, slope), lp = log_softmax(&c.teacher[b * n], n, 1.0 / c.temperature);
      const double beta = c.beta;
      Values lm(n), d(n);
      double ce = 0, kl = 0, rkl = 0, to_m = 0, from_m = 0;
      for (int j = 0; j < n; ++j) {
        const double p = std::exp(lp[j]), q = std::exp(lq[j]);
        lm[j] = std::log(beta * p + (1 - beta) * q);
        ce -= times(p, lq[j]);
        kl += times(p, lp[j] - lq[j]);
        rkl += times(q, lq[j] - lp[j]);
        to_m += times(p, lp[j] - lm[j]);
        from_m += times(q, lq[j] - lm[j]);
      }
      for (int j = 0; j < n; ++j) {
        const double p = std::exp(lp[j]), q = std::exp(lq[j]);
        const double reverse = times(q, lq[j] - lp[j] - rkl);
        switch (*c.form) {
          case Form::kCrossEntropy:
          case Form::kKl:
            d[j] = q - p;
            break;
          case Form::kReverseKl:
            d[j] = reverse;
            break;
          case Form::kSymmetricKl:
            d[j] = 0.5 * (q - p) + 0.5 * reverse;
            break;
          case Form::kJsd:
            d[j] = times((1 - beta) * q, lq[j] - lm[j] - from_m);
            break;
        }
        if (c.soft_weights) gradient[j] += times(c.soft_weight[b], slope * d[j]);
      }
      const double values[] = {ce, kl, rkl, 0.5 * kl + 0.5 * rkl, times(beta, to_m) + times(1 - beta, from_m)};
      result.soft.push_back(values[static_cast<int>(*c.form)]);
    }
    if (c.labels || c.label_probs) {
      const Values log_q = log_softmax(s, n, 1.0);
      Values y(n, 0.0);
      double value = 0.0, total = 0.0;
      const bool in_range = c.labels && c.label[b] >= 0 && c.label[b] < n;
      if (in_range) y[c.label[b]] = 1.0;
      if (c.label_probs) y.assign(&c.probs[b * n], &c.probs[b * n] + n);
      for (int j = 0; j < n; ++j) {
        value -= times(y[j], log_q[j]);
        total += y[j];
      }
      if (c.labels && !in_range) value = total = kNan;
      for (int j = 0; j < n; ++j) {
        if (c.hard_weights) gradient[j] += times(c.hard_weight[b], std::exp(log_q[j]) * total - y[j]);
      }
      result.hard.push_back(value);
    }
    result.gradient.insert(result.gradient.end(), gradient.begin(), gradient.end());
  }
  return result;
}

// ---- Drawing and running -------------------------------------------------------------------------------

template <class T>
void draw(Case& c, unsigned seed, double scale = 3.0) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, scale);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  const std::int64_t n = c.batch * c.classes;
  for (std::int64_t i = 0; i < n; ++i) {
    c.student.push_back(rounded<T>(normal(random)));
    c.teacher.push_back(rounded<T>(normal(random)));
    c.probs.push_back(uniform(random) < 0.5 ? 0.0 : rounded<T>(uniform(random)));
  }
  for (std::int64_t b = 0; b < c.batch; ++b) {
    c.soft_weight.push_back(static_cast<float>(normal(random)));
    c.hard_weight.push_back(static_cast<float>(normal(random)));
    c.label.push_back(static_cast<std::int64_t>(uniform(random) * c.classes));
  }
}

// `threads`, `parts`, staged rounds: what make_plan() would choose on a large device, on a small scale. `team`: 0 for
// the whole block, else the lanes of a warp that have a row.
template <class T>
Plan small_plan(int classes, int tensors, int parts, int threads, int staged, int team = 0) {
  Plan plan;
  plan.parts = parts;
  plan.threads = threads;
  plan.team = team == 0 ? threads : team;
  plan.chunks = static_cast<int>(divide_up(divide_up(classes + T::kLanes - 1, T::kLanes), parts));
  plan.staged = std::min<int>(staged, static_cast<int>(divide_up(plan.chunks, plan.team)));
  plan.round_bytes = threads * 16 * tensors;
  plan.shared_bytes = kExchangeBytes + plan.staged * plan.round_bytes;
  return plan;
}

struct Leads {
  int student = 0, teacher = 0, probs = 0, gradient = 0;
};

struct Wanted {
  bool soft = true, hard = true, gradient = true, backwards = false;
};

template <class T>
Result run(const Case& c, const Plan& plan, Leads leads = {}, Wanted wanted = {}) {
  const bool soft = c.form.has_value(), hard = c.labels || c.label_probs;
  const auto batch = static_cast<std::size_t>(c.batch);
  const std::size_t n = batch * static_cast<std::size_t>(c.classes);
  Tensor<T> student(c.student, leads.student), teacher(c.teacher, leads.teacher), probs(c.probs, leads.probs);
  Tensor<T> gradient(Values(n, 77.0), leads.gradient);
  const std::vector<float> soft_weight(c.soft_weight.begin(), c.soft_weight.end());
  const std::vector<float> hard_weight(c.hard_weight.begin(), c.hard_weight.end());
  std::vector<float> soft_value(batch, 77.0f), hard_value(batch, 77.0f);

  Problem problem;
  problem.setting =
      make_setting(c.form.value_or(Form::kCrossEntropy), soft, hard, c.temperature, c.soften_student, c.beta);
  problem.student = student.data();
  problem.teacher = soft ? teacher.data() : nullptr;
  problem.label_probs = c.label_probs ? probs.data() : nullptr;
  problem.labels = c.labels ? c.label.data() : nullptr;
  problem.soft_weight = c.soft_weights ? soft_weight.data() : nullptr;
  problem.hard_weight = c.hard_weights ? hard_weight.data() : nullptr;
  problem.soft = soft && wanted.soft ? soft_value.data() : nullptr;
  problem.hard = hard && wanted.hard ? hard_value.data() : nullptr;
  problem.gradient = wanted.gradient ? gradient.data() : nullptr;
  problem.batch = c.batch;
  problem.classes = c.classes;

  const gpu::Launch launch{static_cast<unsigned>(blocks_of(plan, c.batch)), static_cast<unsigned>(plan.parts),
                           static_cast<unsigned>(plan.threads), static_cast<std::size_t>(plan.shared_bytes)};
  with_kernel<T>(problem, [&](auto kernel) { launch.run([&] { kernel(problem, plan); }, wanted.backwards); });

  EXPECT_TRUE(gradient.intact()) << "written beside the gradient";
  Result result;
  if (soft) result.soft.assign(soft_value.begin(), soft_value.end());
  if (hard) result.hard.assign(hard_value.begin(), hard_value.end());
  for (std::size_t i = 0; i < n; ++i) result.gradient.push_back(gradient[i]);
  return result;
}

// ---- Comparing -----------------------------------------------------------------------------------------

// The rounding of a gradient in the tensors' dtype, and that of float32 arithmetic on numbers of the size of 1.
template <class T>
void expect_close(const Result& got, const Result& want) {
  expect_near("soft", got.soft, want.soft, 2e-6, 2e-6);
  expect_near("hard", got.hard, want.hard, 2e-6, 2e-6);
  expect_near("gradient", got.gradient, want.gradient, half_unit<T>() + 2e-6, 2e-6);
}

std::string words(const Case& c, const Plan& plan) {
  return "form " + std::to_string(c.form ? static_cast<int>(*c.form) : -1) + ", labels " + std::to_string(c.labels) +
         ", label_probs " + std::to_string(c.label_probs) + ", T " + std::to_string(c.temperature) + ", softened " +
         std::to_string(c.soften_student) + ", classes " + std::to_string(c.classes) + ", parts " +
         std::to_string(plan.parts) + ", threads " + std::to_string(plan.threads) + ", team " +
         std::to_string(plan.team) + ", staged " + std::to_string(plan.staged);
}

template <class T>
void check(const Case& c, const Plan& plan, Leads leads = {}) {
  SCOPED_TRACE(words(c, plan));
  expect_close<T>(run<T>(c, plan, leads), expected(c));
}

// ---- The kernels ---------------------------------------------------------------------------------------

template <class T>
class SoftTargetCuda : public testing::Test {};
using Dtypes = testing::Types<gpu::Float32, gpu::Float16, gpu::Bfloat16>;
TYPED_TEST_SUITE(SoftTargetCuda, Dtypes);

TYPED_TEST(SoftTargetCuda, ComputesEveryFormWithEveryKindOfLabel) {
  unsigned seed = 1;
  for (const bool soften : {true, false}) {
    for (const float temperature : {1.0f, 2.5f}) {
      for (int form = -1; form < 5; ++form) {
        for (int hard = 0; hard < 3; ++hard) {
          if (form < 0 && hard == 0) continue;
          Case c;
          c.classes = 77;
          c.form = form < 0 ? std::nullopt : std::optional<Form>(static_cast<Form>(form));
          c.labels = hard == 1;
          c.label_probs = hard == 2;
          c.temperature = temperature;
          c.soften_student = soften;
          draw<TypeParam>(c, seed++);
          check<TypeParam>(c, small_plan<TypeParam>(c.classes, c.form ? 2 : 1, 1, 32, 99));
        }
      }
    }
  }
}

TYPED_TEST(SoftTargetCuda, AgreesInEveryLayout) {
  unsigned seed = 1000;
  for (const Form form : {Form::kSymmetricKl, Form::kJsd}) {
    for (const int classes : {1, 9, 300, 1021}) {
      Case c;
      c.batch = 2;
      c.classes = classes;
      c.form = form;
      c.labels = true;
      draw<TypeParam>(c, seed++);
      for (const int parts : {1, 2, 4}) {
        for (const int staged : {0, 1, 99}) {           // nothing, a part, all of a row in shared memory
          if (staged == 1 && classes < 1021) continue;  // it is all of it
          check<TypeParam>(c, small_plan<TypeParam>(classes, 2, parts, 64, staged));
        }
      }
      check<TypeParam>(c, small_plan<TypeParam>(classes, 2, 1, 96, 99));
    }
    Case c;
    c.batch = 1;
    c.classes = 300;
    c.form = form;
    c.labels = true;
    draw<TypeParam>(c, seed++);
    check<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 1, 256, 99));
    if (form == Form::kJsd)
      check<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 16, 64, 99));  // as many as there are
  }
}

TYPED_TEST(SoftTargetCuda, SharesABlockAmongShortRows) {
  unsigned seed = 1500;
  for (const Form form : kForms) {
    for (const int team : {1, 2, 8, 32}) {
      Case c;
      c.batch = 70 / team + 1;  // the last block is not full
      c.classes = form == Form::kKl ? 10 : 53;
      c.form = form;
      c.labels = true;
      draw<TypeParam>(c, seed++);
      for (const int staged : {0, 1, 99}) check<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 1, 64, staged, team));
    }
  }
}

TYPED_TEST(SoftTargetCuda, CopiesInQuarters) {
  Case c;
  c.batch = 1;
  c.classes = 64 * TypeParam::kLanes * 9 + 5;
  draw<TypeParam>(c, 5);
  for (const int staged : {1, 2, 4, 5, 8, 9, 99}) {  // rounds, among quarters
    check<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 1, 64, staged));
  }
}

TYPED_TEST(SoftTargetCuda, TakesRowsThatLieAnywhere) {
  Case c;
  c.classes = 67;  // odd: every row begins elsewhere
  c.label_probs = true;
  draw<TypeParam>(c, 7);
  for (int lead = 0; lead < TypeParam::kLanes; ++lead) {
    const Leads alike{lead, lead, lead, lead};
    check<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 1, 32, 99), alike);
    check<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 2, 64, 1), alike);
  }
  for (const Leads& leads : {Leads{1, 0, 0, 0}, Leads{0, 1, 0, 0}, Leads{0, 0, 1, 0}, Leads{0, 0, 0, 1}}) {
    check<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 1, 32, 99), leads);
    check<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 1, 64, 1), leads);
  }
}

TYPED_TEST(SoftTargetCuda, WritesWhatIsWantedAlone) {
  for (const Form form : {Form::kKl, Form::kReverseKl}) {
    for (const int parts : {1, 2}) {
      Case c;
      c.classes = 40;
      c.form = form;
      c.label_probs = true;
      draw<TypeParam>(c, 11);
      const Result all = expected(c);
      const Plan plan = small_plan<TypeParam>(c.classes, 2, parts, 64, 99);
      const auto untouched = [](const Values& values) {
        return std::all_of(values.begin(), values.end(), [](double x) { return x == 77.0; });
      };
      Result some = run<TypeParam>(c, plan, {}, {false, false, true});
      EXPECT_TRUE(untouched(some.soft) && untouched(some.hard));
      expect_close<TypeParam>({all.soft, all.hard, some.gradient}, all);
      some = run<TypeParam>(c, plan, {}, {true, false, false});
      EXPECT_TRUE(untouched(some.hard) && untouched(some.gradient));
      expect_close<TypeParam>({some.soft, all.hard, all.gradient}, all);
      some = run<TypeParam>(c, plan, {}, {false, true, false});
      EXPECT_TRUE(untouched(some.soft) && untouched(some.gradient));
      expect_close<TypeParam>({all.soft, some.hard, all.gradient}, all);
    }
  }
}

TYPED_TEST(SoftTargetCuda, LeavesOutWhatHasNoWeight) {
  for (const Form form : kForms) {
    Case c;
    c.classes = 21;
    c.form = form;
    c.labels = true;
    draw<TypeParam>(c, 13);
    c.soft_weight[0] = c.hard_weight[1] = c.soft_weight[2] = c.hard_weight[2] = 0.0;
    // Row 2 has NaN in it, and a label that is none: its values are NaN, its gradient is 0 all the same.
    c.student[2 * 21 + 4] = kNan;
    c.label[2] = -100;
    const Plan plan = small_plan<TypeParam>(c.classes, 2, 1, 32, 99);
    const Result got = run<TypeParam>(c, plan);
    expect_close<TypeParam>(got, expected(c));
    EXPECT_TRUE(std::isnan(got.soft[2]) && std::isnan(got.hard[2]));
    for (int j = 0; j < 21; ++j) EXPECT_EQ(got.gradient[2 * 21 + j], 0.0);
    c.soft_weights = false;
    check<TypeParam>(c, plan);
    c.hard_weights = false;
    EXPECT_EQ(run<TypeParam>(c, plan).gradient, Values(3 * 21, 0.0));
  }
}

TYPED_TEST(SoftTargetCuda, SaysNanForLabelsOutOfRange) {
  for (const std::int64_t label : {std::int64_t{-1}, std::int64_t{12}, std::int64_t{1} << 32}) {
    Case c;
    c.classes = 12;
    c.form = std::nullopt;
    c.labels = true;
    draw<TypeParam>(c, 17);
    c.label[1] = label;
    const Result got = run<TypeParam>(c, small_plan<TypeParam>(c.classes, 1, 1, 32, 99));
    EXPECT_FALSE(std::isnan(got.hard[0]));
    EXPECT_TRUE(std::isnan(got.hard[1]));
    EXPECT_TRUE(std::isnan(got.gradient[12]));
    expect_close<TypeParam>(got, expected(c));
  }
}

TYPED_TEST(SoftTargetCuda, TakesClassesThatAreMaskedOut) {
  for (const Form form : kForms) {
    Case c;
    c.batch = 4;
    c.classes = 100;
    c.form = form;
    c.labels = true;
    draw<TypeParam>(c, 19);
    // Whole chunks, and the first thread's; in both, then in the teacher or the student alone.
    for (int j = 0; j < 40; ++j) c.student[j] = c.teacher[j] = -kInf;
    c.label[0] = 50;
    if (form == Form::kCrossEntropy || form == Form::kKl || form == Form::kJsd) c.teacher[100 + 3] = -kInf;
    if (form == Form::kReverseKl || form == Form::kJsd) c.student[200 + 5] = -kInf;
    // All of them: no distribution, so NaN.
    for (int j = 0; j < 100; ++j) c.student[300 + j] = -kInf;
    for (const int parts : {1, 4}) check<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, parts, 64, 99));
    EXPECT_TRUE(std::isnan(expected(c).soft[3]));
    EXPECT_FALSE(std::isnan(expected(c).soft[0] + expected(c).soft[1] + expected(c).soft[2]));
  }
}

TYPED_TEST(SoftTargetCuda, IsInfiniteWhereTheStudentRulesOutWhatTheTeacherDoesNot) {
  for (const Form form : {Form::kCrossEntropy, Form::kKl}) {
    Case c;
    c.batch = 1;
    c.form = form;
    draw<TypeParam>(c, 23);
    c.student[4] = -kInf;
    const Result got = run<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 1, 32, 99));
    EXPECT_EQ(got.soft[0], kInf);
    expect_close<TypeParam>(got, expected(c));
  }
}

TYPED_TEST(SoftTargetCuda, SaysNanForNanAndInfinity) {
  for (const double bad : {kNan, kInf}) {
    for (const Form form : kForms) {
      for (const bool in_student : {true, false}) {
        Case c;
        c.batch = 2;
        c.classes = 300;
        c.form = form;
        draw<TypeParam>(c, 29);
        (in_student ? c.student : c.teacher)[130] = bad;
        const Result got = run<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 2, 64, 99));
        EXPECT_TRUE(std::isnan(got.soft[0])) << got.soft[0];
        EXPECT_FALSE(std::isnan(got.soft[1]));
        for (int j = 0; j < 300; ++j) EXPECT_TRUE(std::isnan(got.gradient[j])) << j;
      }
    }
  }
}

TYPED_TEST(SoftTargetCuda, IsExactlyZeroForEqualLogits) {
  for (const Form form : {Form::kKl, Form::kReverseKl, Form::kSymmetricKl, Form::kJsd}) {
    Case c;
    c.classes = 130;
    c.form = form;
    c.beta = 0.5f;
    draw<TypeParam>(c, 31);
    c.teacher = c.student;
    const Result got = run<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 2, 64, 99));
    EXPECT_EQ(got.soft, Values(3, 0.0));
    EXPECT_EQ(got.gradient, Values(3 * 130, 0.0));
  }
}

TYPED_TEST(SoftTargetCuda, StaysAccurateForLargeLogits) {
  for (const Form form : kForms) {
    Case c;
    c.classes = 64;
    c.form = form;
    c.labels = true;
    c.temperature = 3.0f;
    draw<TypeParam>(c, 37);
    for (std::size_t i = 0; i < c.student.size(); ++i) {
      c.student[i] = rounded<TypeParam>(9900.0 + 8.0 * static_cast<double>(i % 3) + (i % 7 == 0 ? -19000.0 : 0.0));
      c.teacher[i] = rounded<TypeParam>(9900.0 + 8.0 * static_cast<double>(i % 5) + (i % 11 == 0 ? -19000.0 : 0.0));
    }
    check<TypeParam>(c, small_plan<TypeParam>(c.classes, 2, 2, 64, 99));
  }
}

TYPED_TEST(SoftTargetCuda, DoesNotDependOnTheOrderOfBlocks) {
  Case c;
  c.classes = 500;
  c.form = Form::kSymmetricKl;
  c.label_probs = true;
  draw<TypeParam>(c, 41);
  for (const int parts : {1, 4}) {
    const Plan plan = small_plan<TypeParam>(c.classes, 2, parts, 64, 99);
    const Result forth = run<TypeParam>(c, plan);
    const Result back = run<TypeParam>(c, plan, {}, {true, true, true, true});
    EXPECT_EQ(forth.soft, back.soft);
    EXPECT_EQ(forth.hard, back.hard);
    EXPECT_EQ(forth.gradient, back.gradient);
  }
}

// ---- The arithmetic alone ------------------------------------------------------------------------------

using Symmetric = Kind<static_cast<int>(Form::kSymmetricKl), true>;

void add(Statistics<Symmetric>& to, const Setting& setting, const float (&s)[4], const float (&t)[4]) {
  to.add(setting, *std::max_element(s, s + 4), *std::max_element(t, t + 4), s, t);
  const float y[4] = {0.1f, 0.2f, 0.3f, 0.4f};
  to.add_labels(setting, s, y);
}

TEST(SoftTargetCudaMath, JoinsPartsInAnyOrder) {
  const Setting setting = make_setting(Form::kSymmetricKl, true, true, 2.5f, true, 0.5f);
  const float low[4] = {-80.0f, -81.0f, -95.0f, -79.5f}, high[4] = {90.0f, 89.0f, -3.0f, 88.0f};
  const float gone[4] = {-gpu::infinity(), -gpu::infinity(), -gpu::infinity(), -gpu::infinity()};
  Statistics<Symmetric> a, b, none, whole;
  for (Statistics<Symmetric>* some : {&a, &whole}) add(*some, setting, low, high);
  for (Statistics<Symmetric>* some : {&b, &whole}) {
    add(*some, setting, high, low);
    add(*some, setting, high, high);
  }
  Statistics<Symmetric> ab = a, ba = b;
  ab.merge(setting, b);
  ba.merge(setting, a);
  EXPECT_EQ(std::memcmp(&ab, &ba, 10 * sizeof(float)), 0);
  ab.merge(setting, none);
  none.merge(setting, ba);
  for (const Statistics<Symmetric>& joined : {ab, none}) {
    EXPECT_EQ(joined.student_offset, whole.student_offset);
    EXPECT_EQ(joined.teacher_offset, whole.teacher_offset);
    EXPECT_FLOAT_EQ(joined.student_sum, whole.student_sum);
    EXPECT_FLOAT_EQ(joined.plain_sum, whole.plain_sum);
    EXPECT_FLOAT_EQ(joined.teacher_sum, whole.teacher_sum);
    EXPECT_FLOAT_EQ(joined.forward, whole.forward);
    EXPECT_FLOAT_EQ(joined.backward, whole.backward);
    EXPECT_FLOAT_EQ(joined.label_sum, whole.label_sum);
    EXPECT_FLOAT_EQ(joined.label_dot, whole.label_dot);
  }
  // In float64, relative to the greatest logit of all, 90: the scaled one, 51.9, is rounded to within 2e-6.
  double students = 0, teachers = 0, forward = 0, backward = 0, dot = 0;
  const auto relative = [](double x) { return (x - 90.0) / 2.5 * std::log2(std::exp(1.0)); };
  for (const auto& [s, t] : {std::pair(&low, &high), std::pair(&high, &low), std::pair(&high, &high)}) {
    for (int i = 0; i < 4; ++i) {
      const double x = relative((*s)[i]), y = relative((*t)[i]);
      students += std::exp2(x);
      teachers += std::exp2(y);
      forward += std::exp2(y) * (y - x);
      backward += std::exp2(x) * (x - y);
      dot -= 0.1 * (i + 1) * ((*s)[i] - 90.0) * std::log2(std::exp(1.0));
    }
  }
  EXPECT_NEAR(whole.student_sum, students, 4e-6 * students);
  EXPECT_NEAR(whole.teacher_sum, teachers, 4e-6 * teachers);
  EXPECT_NEAR(whole.forward, forward, 4e-6 * forward);
  EXPECT_NEAR(whole.backward, backward, 4e-6 * backward);
  EXPECT_NEAR(whole.label_dot, dot, 4e-6 * dot);

  Statistics<Symmetric> masked, seen;
  add(masked, setting, gone, gone);
  add(seen, setting, gone, gone);
  EXPECT_EQ(masked.student_sum, 0.0f);
  EXPECT_EQ(masked.forward, 0.0f);
  add(seen, setting, low, high);  // as if nothing had been before, but for the labels
  EXPECT_EQ(seen.student_sum, a.student_sum);
  EXPECT_EQ(seen.forward, a.forward);
  EXPECT_EQ(seen.backward, a.backward);
  EXPECT_EQ(seen.label_dot, gpu::infinity());
}

TEST(SoftTargetCudaMath, RaisesTheBaseSeldomAndLosesNothing) {
  const Setting setting = make_setting(Form::kSymmetricKl, true, false, 1.0f, true, 0.5f);
  Statistics<Symmetric> sums;
  const auto rise = [&](float x) {
    const float s[4] = {x, x, x, x};
    const float before = sums.student_offset;
    add(sums, setting, s, s);
    return sums.student_offset != before;
  };
  EXPECT_TRUE(rise(1.0f));
  EXPECT_FALSE(rise(3.0f));
  EXPECT_FALSE(rise(-7.0f));
  EXPECT_TRUE(rise(1.0f + 9.0f / kLog2E));
  EXPECT_EQ(sums.forward, 0.0f);
  EXPECT_EQ(sums.backward, 0.0f);
  const double want = 4 * (std::exp(1.0) + std::exp(3.0) + std::exp(-7.0) + std::exp(1.0 + 9.0 / kLog2E));
  EXPECT_NEAR(sums.student_sum * std::exp2(-static_cast<double>(sums.student_offset)), want, 1e-6 * want);
}

TEST(SoftTargetCudaMath, JoinsNothingWithNothing) {
  const Setting setting = make_setting(Form::kSymmetricKl, true, false, 1.0f, true, 0.5f);
  Statistics<Symmetric> a, b;
  a.merge(setting, b);
  EXPECT_EQ(a.student_sum, 0.0f);
  EXPECT_EQ(a.forward, 0.0f);
  EXPECT_EQ(a.student_offset, kNoOffset);
}

TEST(SoftTargetCudaMath, MixesWithoutLeavingTheRange) {
  for (const float beta : {0.1f, 0.5f, 0.9f}) {
    for (const auto& [lp, lq] :
         std::vector<std::pair<float, float>>{{-1, -2}, {-2, -1}, {-120, -3}, {-5, -125}, {-7, -7}}) {
      const double want =
          std::log2(beta * std::exp2(static_cast<double>(lp)) + (1.0 - beta) * std::exp2(static_cast<double>(lq)));
      EXPECT_NEAR(log_mixture(lp, lq, beta), want, 1e-6 * (1 + std::fabs(want)));
    }
    EXPECT_FLOAT_EQ(log_mixture(-gpu::infinity(), -4.0f, beta), -4.0f + std::log2(1.0f - beta));
    EXPECT_FLOAT_EQ(log_mixture(-4.0f, -gpu::infinity(), beta), -4.0f + std::log2(beta));
  }
  EXPECT_EQ(log_mixture(-3.3f, -3.3f, 0.5f), -3.3f);
  EXPECT_TRUE(std::isnan(log_mixture(gpu::nan(), -1.0f, 0.5f)));
  EXPECT_TRUE(std::isnan(log_mixture(-1.0f, gpu::nan(), 0.5f)));
}

TEST(SoftTargetCudaMath, LeavesOutTheSideWithoutShare) {
  for (const float beta : {0.0f, 1.0f}) {
    Case c;
    c.form = Form::kJsd;
    c.beta = beta;
    draw<gpu::Float32>(c, 43);
    c.teacher[2] = -kInf;  // the infinite term has the weight 0, or is none
    c.student[3] = -kInf;
    const Result got = run<gpu::Float32>(c, small_plan<gpu::Float32>(c.classes, 2, 1, 32, 99));
    for (const double value : got.soft) EXPECT_NEAR(value, 0.0, 1e-6);
    for (const double value : got.gradient) EXPECT_NEAR(value, 0.0, 1e-6);
  }
}

// ---- The emulation itself ------------------------------------------------------------------------------

TEST(GpuEmulation, ConvertsHalfPrecisionAsDefined) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float x = gpu::half_to_float(half);
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(gpu::half_to_float(gpu::float_to_half(x))));
      continue;
    }
    ASSERT_EQ(gpu::float_to_half(x), half) << x;
  }
  // Definition of a few; between any two neighbours: the nearer one, of two equally near ones the even one.
  EXPECT_EQ(gpu::half_to_float(0x3c00), 1.0f);
  EXPECT_EQ(gpu::half_to_float(0x0001), 0x1p-24f);
  EXPECT_EQ(gpu::half_to_float(0xfbff), -65504.0f);
  for (std::uint16_t bits = 0; bits < 0x7bff; ++bits) {
    const auto above = static_cast<std::uint16_t>(bits + 1);
    const float x = gpu::half_to_float(bits), y = gpu::half_to_float(above), middle = 0.5f * (x + y);
    ASSERT_LT(x, y);
    ASSERT_EQ(gpu::float_to_half(std::nextafter(middle, x)), bits);
    ASSERT_EQ(gpu::float_to_half(std::nextafter(middle, y)), above);
    ASSERT_EQ(gpu::float_to_half(middle), bits % 2 == 0 ? bits : above);
  }
  EXPECT_EQ(gpu::float_to_half(65519.0f), 0x7bff);
  EXPECT_EQ(gpu::float_to_half(65520.0f), 0x7c00);
  EXPECT_EQ(gpu::float_to_bfloat(1.00390625f), 0x3f80);  // halfway: to even
  EXPECT_EQ(gpu::float_to_bfloat(1.01171875f), 0x3f82);
  EXPECT_EQ(gpu::float_to_bfloat(3.4e38f), 0x7f80);  // beyond the largest: infinite
  EXPECT_TRUE(std::isnan(gpu::Bfloat16::widen(gpu::float_to_bfloat(gpu::nan()))));
}

TEST(GpuEmulation, DelaysCopiesUntilTheyAreWaitedFor) {
  alignas(16) float source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  gpu::Launch{1, 1, 32, 32}.run([&] {
    if (gpu::thread() != 0) return;
    auto* shared = reinterpret_cast<float*>(gpu::shared_memory());
    gpu::copy_to_shared(shared, source);
    gpu::commit();
    gpu::copy_to_shared(shared + 4, source + 4);
    gpu::commit();
    EXPECT_TRUE(std::isnan(shared[0]));
    gpu::wait_for_all_but<1>();
    EXPECT_EQ(shared[3], 4.0f);
    EXPECT_TRUE(std::isnan(shared[4]));
    gpu::wait_for_all_but<0>();
    EXPECT_EQ(shared[7], 8.0f);
  });
}

TEST(GpuEmulation, ShowsThatABarrierIsMissing) {
  int early = 0;
  gpu::Launch{1, 1, 64, 256}.run([&] {
    auto* shared = reinterpret_cast<float*>(gpu::shared_memory());
    shared[gpu::thread()] = 1.0f;
    if (std::isnan(shared[63 - gpu::thread()])) ++early;
    gpu::block_barrier();
    EXPECT_EQ(shared[63 - gpu::thread()], 1.0f);
  });
  EXPECT_GT(early, 0);
}

TEST(GpuEmulation, EndsWhereThreadsWaitForWhatNeverComes) {
  gpu::Fibers fibers;
  gpu::Fibers::Sleepers sleepers;
  for (int i = 0; i < 3; ++i) fibers.add([&] { fibers.sleep(sleepers); });
  EXPECT_THROW(fibers.run(), std::logic_error);
}

// ---- The choice of a layout ----------------------------------------------------------------------------

const Device kA100{108, 163 << 10, 164 << 10, 1};
const Device kH100{132, 227 << 10, 228 << 10, 16};
const Device kSmall{46, 99 << 10, 100 << 10, 8};  // a desktop card of compute capability 12.0

TEST(SoftTargetPlan, CoversEveryRowWithinTheDevicesLimits) {
  for (const Device& device : {kA100, kH100, kSmall}) {
    for (const std::int64_t batch : {1, 2, 7, 64, 256, 4096, 1 << 20}) {
      for (const int classes : {1, 2, 10, 100, 1000, 1001, 32000, 50257, 128256, 262144, 1 << 24}) {
        for (const int lanes : {4, 8}) {
          for (const int tensors : {1, 2}) {
            const Plan plan = make_plan(device, batch, classes, lanes, tensors);
            SCOPED_TRACE("batch " + std::to_string(batch) + ", classes " + std::to_string(classes) + ", lanes " +
                         std::to_string(lanes) + ", tensors " + std::to_string(tensors) + ", parts " +
                         std::to_string(plan.parts));
            EXPECT_GE(static_cast<std::int64_t>(plan.parts) * plan.chunks * lanes, classes + lanes - 1);
            EXPECT_LT(static_cast<std::int64_t>(plan.parts - 1) * plan.chunks * lanes, classes + lanes - 1);
            EXPECT_TRUE(plan.threads % 32 == 0 && plan.threads >= 32 && plan.threads <= kMostThreads);
            EXPECT_LE(plan.shared_bytes, device.shared_of_block);
            EXPECT_EQ(plan.round_bytes, plan.threads * 16 * tensors);
            EXPECT_EQ(plan.shared_bytes, kExchangeBytes + plan.staged * plan.round_bytes);
            EXPECT_LE((plan.staged - 1) * plan.team, plan.chunks);
            EXPECT_LE(plan.parts, device.largest_cluster);
            EXPECT_EQ(plan.parts & (plan.parts - 1), 0);  // as merge_lanes() needs it
            if (plan.team <= 32) {
              EXPECT_EQ(plan.team & (plan.team - 1), 0);
              EXPECT_EQ(plan.parts, 1);
            } else {
              EXPECT_EQ(plan.team, plan.threads);
              EXPECT_LE(plan.parts, plan.threads);  // each thread posts to one block
            }
            const std::int64_t blocks = blocks_of(plan, batch);
            EXPECT_GE(blocks * plan.threads / plan.team, batch * plan.parts);
            EXPECT_LT((blocks - plan.parts) * plan.threads / plan.team, batch * plan.parts);
          }
        }
      }
    }
  }
}

TEST(SoftTargetPlan, ReadsRowsOnceWithThreeBlocksPerMultiprocessor) {
  for (const int classes : {1000, 32000, 50257, 128256}) {
    const Plan plan = make_plan(kH100, 4096, classes, 8, 2);
    EXPECT_GE(plan.staged * plan.team, plan.chunks) << classes;
    EXPECT_LE(3 * (plan.shared_bytes + kReservedBytes), kH100.shared_of_multiprocessor) << classes;
  }
  EXPECT_EQ(make_plan(kH100, 4096, 32000, 8, 2).parts, 2);
  EXPECT_EQ(make_plan(kH100, 4096, 128256, 8, 2).parts, 8);
  EXPECT_EQ(make_plan(kA100, 4096, 32000, 8, 2).parts, 1);
}

TEST(SoftTargetPlan, SpreadsFewRows) {
  EXPECT_EQ(make_plan(kH100, 64, 32000, 8, 2).parts, 8);
  EXPECT_EQ(make_plan(kH100, 64, 1000, 8, 2).parts, 1);  // too short to share
  for (const std::int64_t batch : {1, 8, 16}) {
    const Plan few = make_plan(kH100, batch, 262144, 4, 2);
    EXPECT_EQ(few.parts, 16);
    EXPECT_EQ(make_plan(kH100, batch, 128256, 8, 2).parts, 16);
  }
  const Plan one = make_plan(kH100, 1, 262144, 4, 2);
  EXPECT_GE(one.staged * one.team, one.chunks);  // alone on its multiprocessor, it reads once
}

TEST(SoftTargetPlan, GivesShortRowsAFewLanes) {
  EXPECT_EQ(make_plan(kH100, 65536, 10, 8, 2).team, 2);  // 10 classes and 7 before them: at most three chunks
  EXPECT_EQ(make_plan(kH100, 65536, 10, 8, 2).threads, kMostThreads);
  EXPECT_EQ(make_plan(kH100, 65536, 100, 4, 2).team, 16);
  EXPECT_EQ(make_plan(kH100, 65536, 1000, 8, 2).team, 32);
  EXPECT_EQ(make_plan(kH100, 65536, 2000, 8, 2).team, kMostThreads / 2);
  // As many blocks as there are multiprocessors, before full ones.
  const Plan some = make_plan(kH100, 1024, 1000, 8, 2);
  EXPECT_GE(blocks_of(some, 1024), 2 * 132);
  const Plan few = make_plan(kH100, 8, 10, 8, 2);
  EXPECT_EQ(blocks_of(few, 8), 8);
}

}  // namespace
}  // namespace pykd::kernels::soft_target
