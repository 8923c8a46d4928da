// Tests of stacks of layers in one kernel, on the emulator: every layer against the f64 reference
// of what it was given, and against what other ways to run it leave.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iostream>
#include <iterator>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "gemm_testing.h"
#include "mlp_kernels.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::emulator;
using namespace neuron_ext::testing;

using Widths = std::vector<std::int64_t>;

/// A tensor of the stack's: what the kernels see of it, and what the reference does.
struct Operand {
  View host;
  std::unique_ptr<GlobalArray> device;

  Operand(DType dtype, Layout layout, std::int64_t rows, std::int64_t columns, const Values& values)
      : host(dtype, layout, rows, columns, values), device(on_device(host.storage, "operand")) {}

  const void* base() const {
    return host.base == nullptr
               ? nullptr
               : device->data() + (static_cast<const std::byte*>(host.base) - host.storage.data());
  }
};

/// Whose weights and biases have the layouts of `turn`.
class Stack {
 public:
  struct Options {
    int turn = 0;
    Activation hidden = Activation::kSigmoid, last = Activation::kIdentity;
    Values saved = {};  // of hidden layers: then the stack is a backward's
    Precision precision = Precision::kHighest;
  };

  Stack(DType dtype, std::int64_t rows, const Widths& widths, const Options& options,
        const Values& x, const Values& w, const Values& b)
      : input_(dtype, layout(options.turn), rows, widths[0], x) {
    mlp.dtype = dtype;
    mlp.precision = options.precision;
    mlp.rows = rows;
    mlp.input = input_.base();
    mlp.input_stride_row = input_.host.stride_row;
    mlp.input_stride_column = input_.host.stride_column;
    for (std::size_t i = 0; i + 1 < widths.size(); ++i) {
      const int turn = options.turn + static_cast<int>(i);
      const std::int64_t in = widths[i], out = widths[i + 1];
      weights_.emplace_back(dtype, layout(turn / 2), out, in, w);
      biases_.emplace_back(dtype, turn % 5 == 0 ? Layout::kExpandedColumns : Layout::kGaps, 1, out,
                           b);
      MlpLayer layer;
      layer.in_features = in, layer.out_features = out;
      layer.activation = i + 2 < widths.size() ? options.hidden : options.last;
      layer.weight = weights_.back().base();
      layer.weight_stride_out = weights_.back().host.stride_row;
      layer.weight_stride_in = weights_.back().host.stride_column;
      if (turn % 3 != 1) layer.bias = biases_.back().base();
      layer.bias_stride = biases_.back().host.stride_column;
      const bool has_saved = options.saved && i + 2 < widths.size();
      saved_.emplace_back(dtype, Layout::kRows, has_saved ? rows : 0, out, options.saved);
      layer.saved = saved_.back().base();
      if (options.saved) layer.bias = nullptr;
      layers_.push_back(layer);
    }
    mlp.layers = layers_;
  }
  Stack(const Stack&) = delete;

  /// The outputs of all layers or only of the last, then the sums of those with saved outputs, each
  /// between poisoned elements.
  std::vector<Bytes> run(bool keeps_hidden, const cuda::Device& device = kDevice) {
    std::vector<std::unique_ptr<GlobalArray>> outputs;
    const auto add_output = [&](std::int64_t elements) {
      const std::int64_t bytes = (elements + 2 * kGuard) * size_of(mlp.dtype);
      outputs.push_back(std::make_unique<GlobalArray>(static_cast<std::size_t>(bytes), "output"));
      std::memset(outputs.back()->data(), 0xa5, outputs.back()->size());
      return outputs.back()->data() + kGuard * size_of(mlp.dtype);
    };
    for (MlpLayer& layer : layers_) {
      const bool is_kept = keeps_hidden || &layer == &layers_.back();
      layer.output = is_kept ? add_output(mlp.rows * layer.out_features) : nullptr;
    }
    for (MlpLayer& layer : layers_) {
      if (layer.saved != nullptr) layer.output_sum = add_output(layer.out_features);
    }
    // Nothing of it may be read before it is written.
    GlobalArray workspace(cuda::mlp_workspace(mlp, device), "workspace");
    const cuda::Status status =
        cuda::mlp(mlp, workspace.size() == 0 ? nullptr : workspace.data(), device, nullptr);
    CHECK(status.ok(), name() << ", " << status.kernel << ": " << last_error());
    std::vector<Bytes> results;
    for (const auto& output : outputs) {
      results.emplace_back(output->data(), output->data() + output->size());
    }
    return results;
  }

  /// What layer i gives by the reference, from the outputs of the layers before it.
  cpu::ReferenceGemm reference(std::size_t i, const std::vector<Bytes>& outputs) const {
    const MlpLayer& layer = layers_[i];
    const GemmDesc desc = product_of(mlp, layer);
    GemmPointers at;
    at.a = i == 0 ? input_.host.base : outputs[i - 1].data() + kGuard * size_of(mlp.dtype);
    at.b = weights_[i].host.base;
    at.bias = biases_[i].host.base;
    at.d_saved = saved_[i].host.base;
    return cpu::reference_gemm(desc, at);
  }

  /// Around a layer's output nothing was written.
  void check_guards(const std::vector<Bytes>& outputs) const {
    for (const Bytes& output : outputs) {
      const auto guard = static_cast<std::ptrdiff_t>(kGuard * size_of(mlp.dtype));
      const auto is_poison = [](std::byte b) { return b == std::byte{0xa5}; };
      CHECK(std::all_of(output.begin(), output.begin() + guard, is_poison) &&
                std::all_of(output.end() - guard, output.end(), is_poison),
            name());
    }
  }

  /// is_right(got, exact, magnitude, layer) for every element.
  template <class IsRight>
  void check(const std::vector<Bytes>& outputs, const IsRight& is_right) const {
    check_guards(outputs);
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const cpu::ReferenceGemm expected = reference(i, outputs);
      for (std::size_t e = 0; e < expected.d.size(); ++e) {
        const double got =
            cpu::reference_load(mlp.dtype, outputs[i].data(), kGuard + static_cast<int>(e));
        CHECK(is_right(got, expected.d[e], expected.d_magnitude[e], layers_[i]),
              name() << ", layer " << i << ", element " << e << ": " << got << ", not "
                     << expected.d[e]);
      }
    }
    check_sums(outputs);
  }

  /// Of what the outputs are: within what adding them up, and rounding once, may be off by.
  void check_sums(const std::vector<Bytes>& outputs) const {
    const double eps = mlp.dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    auto sums = outputs.begin() + static_cast<std::ptrdiff_t>(layers_.size());
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      if (layers_[i].saved == nullptr) continue;
      for (std::int64_t j = 0; j < layers_[i].out_features; ++j) {
        double exact = 0, magnitude = 0;
        for (std::int64_t row = 0; row < mlp.rows; ++row) {
          const double x = cpu::reference_load(mlp.dtype, outputs[i].data(),
                                               kGuard + row * layers_[i].out_features + j);
          exact += x;
          magnitude += std::fabs(x);
        }
        const double got = cpu::reference_load(mlp.dtype, sums->data(), kGuard + j);
        const double bound =
            eps * static_cast<double>(mlp.rows) * magnitude + 1.01 * spacing(mlp.dtype, exact);
        CHECK(std::fabs(got - exact) <= bound,
              name() << ", layer " << i << ", column " << j << ": " << got << ", not " << exact);
      }
      ++sums;
    }
  }

  /// The nearest values: for layers whose sums are exact.
  void check_exact(const std::vector<Bytes>& outputs) const {
    check(outputs, [&](double got, double exact, double, const MlpLayer&) {
      double rounded = 0;
      cpu::reference_store(mlp.dtype, &rounded, 0, exact);
      return got == cpu::reference_load(mlp.dtype, &rounded, 0);
    });
  }

  /// As sums and so many roundings leave it.
  void check_close(const std::vector<Bytes>& outputs, int roundings = 1) const {
    check(outputs, [&](double got, double exact, double magnitude, const MlpLayer& layer) {
      if (!std::isfinite(exact)) return std::isnan(exact) ? std::isnan(got) : got == exact;
      const double slope = layer.activation == Activation::kSigmoid ? 0.25 : 1;
      const double relative =
          is_split() ? split_error(mlp.precision, layer.in_features, cuda::kWidestLayer)
                     : sum_error(mlp.dtype, layer.in_features);
      // Where a sum is inf, so is its magnitude.
      const double error = std::isfinite(magnitude) ? slope * relative * magnitude : 0;
      return std::fabs(got - exact) <= error + 1.01 * roundings * spacing(mlp.dtype, exact);
    });
  }

  /// Whether mlp_sm90_f32 takes it, on GPUs that have it.
  bool is_split() const {
    return mlp.dtype == DType::kFloat32 && mlp.precision != Precision::kStrict;
  }

  /// Layer i by gemm_simt, from the outputs of the layers before it, between poisoned elements.
  Bytes run_simt(std::size_t i, const std::vector<Bytes>& outputs) const {
    GemmDesc desc = product_of(mlp, layers_[i]);
    desc.has_d_sum = false;
    const std::int64_t guard = kGuard * size_of(mlp.dtype);
    GlobalArray d(outputs[i].size(), "D");
    std::memset(d.data(), 0xa5, d.size());
    const auto a = on_device(outputs[i == 0 ? 0 : i - 1], "A");
    GemmPointers at;
    at.a = i == 0 ? mlp.input : a->data() + guard;
    at.b = layers_[i].weight;
    at.bias = layers_[i].bias;
    at.d_saved = layers_[i].saved;
    at.d = d.data() + guard;
    const int error = cuda::gemm_simt.run(desc, at, nullptr, kDevice, nullptr);
    CHECK(error == 0, name() << ": " << last_error());
    return {d.data(), d.data() + d.size()};
  }

  /// Some rows of an output of the last layer.
  Bytes rows_of(const Bytes& output, std::int64_t begin, std::int64_t end) const {
    const std::int64_t row = layers_.back().out_features * size_of(mlp.dtype);
    const auto first = output.begin() + kGuard * size_of(mlp.dtype);
    return {first + begin * row, first + end * row};
  }

  std::string name() const {
    std::ostringstream text;
    text << name_of(mlp.dtype) << ' ' << name_of(mlp.precision) << ' ' << mlp.rows << " rows of";
    for (const MlpLayer& layer : layers_) text << ' ' << layer.in_features;
    text << ' ' << layers_.back().out_features << ", turn " << input_.host.stride_row;
    return text.str();
  }

  Mlp mlp;

 private:
  static constexpr std::int64_t kGuard = 64;

  static Layout layout(int turn) { return static_cast<Layout>(turn % kLayouts); }

  Operand input_;
  std::vector<Operand> weights_, biases_, saved_;
  std::vector<MlpLayer> layers_;
};

constexpr Precision kPrecisions[] = {Precision::kHighest, Precision::kStrict, Precision::kHigh,
                                     Precision::kMedium};

/// At most two elements of a row that aren't 0, so that sums stay exact through many layers.
double sparse(std::int64_t i, std::int64_t j) {
  const std::int64_t place = (7 * i + 3) % 11;
  return j % 11 == place && j < 22 ? (i + j) % 3 - 1.0 : 0;
}

/// Around the edges of spans, of slices, and of a warp's or a block's rows; with one
/// multiprocessor, in several turns.
void test_exact_sums() {
  const Widths all[] = {{4, 5, 7, 3}, {64, 64, 64}, {33, 31, 1, 9}, {128, 128, 128},
                        {8, 40, 127}, {65, 97, 2},  {1, 1, 1},      {5, 0, 3},
                        {0, 5, 4},    {16, 72, 56}, {3, 2, 0},      {48, 17, 24}};
  int turn = 0;
  for (const DType dtype : kDTypes) {
    for (const Widths& widths : all) {
      for (const std::int64_t rows : {1, 33, 70, 290}) {
        if (rows == 290 && turn % 3 != 0) {
          ++turn;
          continue;
        }
        change_settings();
        const Precision precision = kPrecisions[turn % std::size(kPrecisions)];
        Stack stack(dtype, rows, widths,
                    {.turn = turn++, .hidden = Activation::kIdentity, .precision = precision},
                    integer, sparse, integer);
        const std::vector<Bytes> outputs = stack.run(true, {90, 1});
        stack.check_exact(outputs);
        change_settings();
        CHECK(stack.run(false).front() == outputs.back(), stack.name() << ", only the output");
        Stack gradients(dtype, rows, widths,
                        {.turn = turn, .saved = exact_saved, .precision = precision}, integer,
                        sparse, integer);
        gradients.check_exact(gradients.run(true, {90, 1}));
      }
    }
  }
}

// What there is of each in tests of random values.
constexpr std::int64_t kMost = 130;

/// Weights of about the square root of a layer's width.
double random_weight(std::int64_t i, std::int64_t j) {
  static const Values values = random_values(4, kMost, kMost, false);
  return values(i, j) / 8;
}

/// Outputs of a sigmoid.
double random_saved(std::int64_t i, std::int64_t j) {
  return 1 / (1 + std::exp(-4 * random_weight(i, j)));
}

/// The same bits in any order of threads, for any lateness, on any number of multiprocessors, with
/// all weights in shared memory or not, whichever outputs are kept, and in a smaller batch.
void test_random(DType dtype, const Widths& widths, const Stack::Options& options) {
  static const Values x = random_values(3, kMost, kMost, false);
  Stack stack(dtype, 100, widths, options, x, random_weight, x);
  for (const int approximation : {-1, 1}) {
    change_settings();
    settings().approximation = approximation;
    stack.check_close(stack.run(true));
  }
  settings() = {};
  const std::vector<Bytes> outputs = stack.run(true);
  stack.check_close(outputs);
  const auto hidden = static_cast<std::ptrdiff_t>(widths.size()) - 2;
  const int other_sm = stack.is_split() ? 90 : 86;
  for (const cuda::Device device : {cuda::Device{90, 1}, {90, 132}, {other_sm, 3}}) {
    settings() = {.order = device.sm_count == 1 ? Order::kReverse : Order::kShuffled,
                  .late_copies = device.sm_count == 3};
    CHECK(stack.run(true, device) == outputs, stack.name() << ", sm_" << device.sm);
    const std::vector<Bytes> last = stack.run(false, device);
    CHECK(std::equal(last.begin(), last.end(), outputs.begin() + hidden), stack.name());
  }
  Stack small(dtype, 7, widths, options, x, random_weight, x);
  CHECK(small.rows_of(small.run(false).front(), 0, 7) ==
            stack.rows_of(outputs[widths.size() - 2], 0, 7),
        small.name());
  if (size_of(dtype) == 2 || stack.is_split()) return;
  for (std::size_t i = 0; i + 1 < widths.size(); ++i) {
    CHECK(stack.run_simt(i, outputs) == outputs[i], stack.name() << ", layer " << i);
  }
}

void test_random() {
  int turn = 0;
  for (const DType dtype : kDTypes) {
    for (const Widths& widths :
         {Widths{64, 64, 64, 64, 64}, {100, 128, 120, 96, 10}, {24, 128, 8}}) {
      if (dtype == DType::kFloat64 && widths[1] > 64) continue;  // by layers
      for (const Precision precision : kPrecisions) {
        if (dtype != DType::kFloat32 && precision != Precision::kHighest) continue;
        const Activation last = turn % 2 == 0 ? Activation::kSigmoid : Activation::kIdentity;
        test_random(dtype, widths, {.turn = 6 * turn, .last = last, .precision = precision});
        test_random(dtype, widths,
                    {.turn = 6 * turn++, .saved = random_saved, .precision = precision});
      }
    }
  }
}

/// Wide layers before, between and after narrow ones, and more layers than a kernel takes.
void test_steps() {
  const Widths deep(41, 5);
  for (const DType dtype : kDTypes) {
    for (const Widths& widths :
         {Widths{140, 20, 30, 150, 140, 12, 9}, {10, 20, 140}, {140, 130, 135}, {3, 4}, deep}) {
      const bool is_deep = widths.size() > 32;
      Stack stack(dtype, is_deep ? 3 : 37, widths, {6}, integer, sparse, integer);
      change_settings();
      settings().approximation = 0;
      const std::vector<Bytes> outputs = stack.run(true);
      stack.check_close(outputs);
      CHECK(stack.run(false).front() == outputs.back(), stack.name() << ", only the output");
      Stack gradients(dtype, 3, widths, {.turn = 6, .saved = random_saved}, integer, sparse,
                      integer);
      // Some products leave the gradient to a pass of its own.
      gradients.check_close(gradients.run(true), 2);
    }
  }
}

/// An inf or a nan stays in its row, however columns are filled up.
void test_special_values() {
  const auto x = [](std::int64_t i, std::int64_t j) {
    if (i == 3 && j == 4) return std::numeric_limits<double>::infinity();
    if (i == 33 && j == 0) return -std::numeric_limits<double>::infinity();
    if (i == 5 && j == 7) return std::nan("");
    return random_weight(i, j);
  };
  for (const DType dtype : kDTypes) {
    for (const Widths& widths : {Widths{9, 33, 7, 70, 3}, {40, 1, 5}}) {
      change_settings();
      Stack stack(dtype, 50, widths, {6}, x, random_weight, random_weight);
      stack.check_close(stack.run(true));
    }
  }
}

/// Sums of more blocks of rows than are added as they are; vectors of 16 bytes, and columns
/// between.
void test_many_rows() {
  const Values x = [](std::int64_t i, std::int64_t j) { return integer(i, j); };
  for (const DType dtype : kDTypes) {
    for (const std::int64_t width : {7, 8}) {
      change_settings();
      Stack stack(dtype, 8300, {5, width, 3}, {.saved = exact_saved}, x, sparse, x);
      stack.check_exact(stack.run(true));
    }
  }
}

/// Where a row's values don't split into parts, those of an input or of a hidden layer, its tile of
/// 128 goes by multiply-adds, and no other; where a weight doesn't, all do.
void test_unsplit_values() {
  constexpr std::int64_t kRows = 300, kRow = 130, kBegin = 128, kEnd = 256;
  const auto x_with = [](double value) {
    return [value](std::int64_t i, std::int64_t j) {
      return random_weight(i % kMost, j) * (i == kRow ? value : 1);
    };
  };
  const auto saved_with = [](double value) {
    return [value](std::int64_t i, std::int64_t j) {
      return random_saved(i % kMost, j) * (i == kRow ? value : 1);
    };
  };
  const auto w_with = [](double value) {
    return [value](std::int64_t i, std::int64_t j) {
      return random_weight(i, j) * (i == 1 && j == 2 ? value : 1);
    };
  };
  struct Case {
    Values x, w, saved;
    bool is_weight = false;
  };
  const Case usual{x_with(1), w_with(1), {}}, usual_backward{x_with(1), w_with(1), saved_with(1)};
  std::vector<Case> cases;
  for (const double value : {std::numeric_limits<double>::infinity(), std::nan(""), 1e25, 1e-32}) {
    cases.push_back({x_with(value), w_with(1), {}});
    cases.push_back({x_with(1), w_with(value), {}, true});
  }
  cases.push_back({x_with(1), w_with(1), saved_with(1e-32)});
  for (const Precision precision : kPrecisions) {
    if (precision == Precision::kStrict) continue;
    for (const Case& special : cases) {
      settings() = {};
      /// The rows of the special one's tile, those before and those after.
      const auto run = [&](Precision by, const Case& given) {
        Stack stack(DType::kFloat32, kRows, {20, 33, 70, 9},
                    {.turn = 6, .saved = given.saved, .precision = by}, given.x, given.w,
                    random_weight);
        const std::vector<Bytes> outputs = stack.run(true, {90, 1});
        if (given.saved) stack.check_sums(outputs);
        const Bytes& output = outputs[2];
        return std::array{stack.rows_of(output, kBegin, kEnd), stack.rows_of(output, 0, kBegin),
                          stack.rows_of(output, kEnd, kRows)};
      };
      const auto got = run(precision, special);
      auto expected = run(Precision::kStrict, special);
      if (!special.is_weight) {
        const auto others = run(precision, special.saved ? usual_backward : usual);
        std::copy(others.begin() + 1, others.end(), expected.begin() + 1);
      }
      CHECK(got == expected, name_of(precision) << ", case " << &special - cases.data());
    }
  }
}

/// Nothing but sums, which are 0.
void test_no_rows() {
  Stack stack(DType::kFloat32, 0, {4, 5, 3}, {.saved = exact_saved}, integer, integer, integer);
  stack.check_exact(stack.run(true));
}

}  // namespace

int main() {
  test_exact_sums();
  test_random();
  test_steps();
  test_special_values();
  test_many_rows();
  test_unsplit_values();
  test_no_rows();
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? 0 : 1;
}
