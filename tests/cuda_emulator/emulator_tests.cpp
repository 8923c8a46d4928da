// Tests of the emulator and, on it, of every wrapper in csrc/cuda/ptx: instructions one by one and
// in small kernels, in all thread orders; then each mistake in those kernels, which must be
// reported. Prints the table of mistakes.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "control.h"
#include "neuron_ext/types.h"
#include "scalar.h"
#include "test_kernels.h"
#include "testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::emulator;
using namespace neuron_ext::emulator_tests;
using testing::failures;
using testing::report_mutex;

// ---- settings ----------------------------------------------------------------------------------

std::vector<Settings> all_settings() {
  std::vector<Settings> all;
  for (const Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    for (const bool late_copies : {false, true}) {
      for (const bool late_products : {false, true}) {
        all.push_back({order, late_copies, late_products, 0, 7});
      }
    }
  }
  return all;
}

std::string name_of(const Settings& settings) {
  constexpr const char* kOrders[] = {"forward", "reverse", "shuffled"};
  std::string name = kOrders[static_cast<int>(settings.order)];
  if (settings.late_copies) name += ", late copies";
  if (settings.late_products) name += ", late products";
  return name;
}

// ---- operands ----------------------------------------------------------------------------------

int integer(int i, int j) { return static_cast<int>(testing::integer(i, j)); }

template <class T>
T element(int value) {
  return cpu::narrow<T>(static_cast<cpu::Accumulator<T>>(value));
}

/// rows x columns of small integers, or its transpose; `seed` tells operands apart. Rows that
/// aren't transposed are `pitch` apart, or without gaps.
template <class T>
void fill(GlobalArray& array, int rows, int columns, bool transposed, int seed, int pitch = 0) {
  T* const data = reinterpret_cast<T*>(array.data());
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      data[transposed ? j * rows + i : i * (pitch == 0 ? columns : pitch) + j] =
          element<T>(integer(i + seed, j));
    }
  }
  array.set_written();
}

constexpr int kSeedA = 1000, kSeedB = 2000;

int exact(int i, int j, int k) {
  int sum = 0;
  for (int p = 0; p < k; ++p) sum += integer(i + kSeedA, p) * integer(j + kSeedB, p);
  return sum;
}

/// Empty if d is scale times A Bᵀ, exactly (sums of these integers are exact in bf16 up to 256).
template <class T>
std::string compare(const GlobalArray& d, int m, int n, int k, int scale) {
  const T* const data = reinterpret_cast<const T*>(d.data());
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      const T expected = element<T>(scale * exact(i, j, k));
      if (std::memcmp(&data[i * n + j], &expected, sizeof(T)) == 0) continue;
      std::ostringstream text;
      text << "wrong value: D(" << i << ", " << j << ") is " << cpu::widen(data[i * n + j])
           << ", not " << cpu::widen(expected);
      return text.str();
    }
  }
  return "";
}

std::size_t size(int rows, int columns, std::size_t element_bytes) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns) * element_bytes;
}

// ---- kernels: each returns what is wrong, or nothing -------------------------------------------

std::string error_of(int status) {
  if (status == 0) return "";
  return last_error().empty() ? "error " + std::to_string(status) : last_error();
}

std::string run_simt(int m, int n, int k, Mistake mistake) {
  GlobalArray a(size(m, k, 4), "A"), b(size(n, k, 4), "B"), d(size(m, n, 4), "D");
  fill<float>(a, m, k, false, kSeedA);
  fill<float>(b, n, k, false, kSeedB);
  const std::string error =
      error_of(multiply_simt({m, n, k, a.data(), b.data(), d.data()}, mistake, nullptr));
  return error.empty() ? compare<float>(d, m, n, k, 1) : error;
}

std::string run_mma(int m, int n, int k, bool b_is_kn, Mistake mistake) {
  const int pitch = (k + 7) / 8 * 8;
  GlobalArray a(size(m, pitch, 2), "A"), b(size(n, pitch, 2), "B"), d(size(m, n, 4), "D");
  fill<BFloat16>(a, m, k, false, kSeedA, pitch);
  fill<BFloat16>(b, n, k, b_is_kn, kSeedB, pitch);
  const std::string error =
      error_of(multiply_mma({m, n, k, a.data(), b.data(), d.data()}, b_is_kn, mistake, nullptr));
  return error.empty() ? compare<float>(d, m, n, k, 1) : error;
}

std::string run_wgmma(int m, int n, int k, const WgmmaVariant& variant, Mistake mistake) {
  GlobalArray a(size(m, k, 2), "A"), b(size(n, k, 2), "B"), d(size(m, n, 2), "D");
  fill<BFloat16>(a, m, k, variant.a_is_km, kSeedA);
  fill<BFloat16>(b, n, k, variant.b_is_kn, kSeedB);
  const std::string error =
      error_of(multiply_wgmma({m, n, k, a.data(), b.data(), d.data()}, variant, mistake, nullptr));
  return error.empty() ? compare<BFloat16>(d, m, n, k, variant.doubles_a ? 2 : 1) : error;
}

std::string run_split(bool first_waits, Mistake mistake) {
  constexpr int kN = 1000, kBlocks = 5;
  GlobalArray x(4 * kN, "x"), parts(4 * kBlocks, "parts"), counter(4, "counter"), y(4, "y");
  fill<float>(x, 1, kN, false, kSeedA);
  std::memset(counter.data(), 0, 4);
  counter.set_written();
  const std::string error = error_of(sum_split(
      reinterpret_cast<float*>(x.data()), kN, kBlocks, first_waits,
      reinterpret_cast<float*>(parts.data()), reinterpret_cast<std::uint32_t*>(counter.data()),
      reinterpret_cast<float*>(y.data()), mistake, nullptr));
  if (!error.empty()) return error;
  float expected = 0;
  for (int i = 0; i < kN; ++i) expected += static_cast<float>(integer(kSeedA, i));
  return *reinterpret_cast<float*>(y.data()) == expected ? "" : "wrong value: y";
}

std::string run_warp(Mistake mistake) {
  constexpr int kWarps = 3;
  GlobalArray x(4 * 32 * kWarps, "x"), y(4 * kWarps, "y");
  fill<float>(x, 1, 32 * kWarps, false, kSeedA);
  const std::string error =
      error_of(sum_warps(reinterpret_cast<float*>(x.data()), kWarps,
                         reinterpret_cast<float*>(y.data()), mistake, nullptr));
  if (!error.empty()) return error;
  for (int w = 0; w < kWarps; ++w) {
    float expected = 0;
    for (int i = 32 * w; i < 32 * w + 32; ++i) expected += static_cast<float>(integer(kSeedA, i));
    if (reinterpret_cast<float*>(y.data())[w] != expected) return "wrong value: y";
  }
  return "";
}

void test_kernels() {
  for (const Settings& chosen : all_settings()) {
    settings() = chosen;
    const auto check = [&](const std::string& error, const char* kernel) {
      CHECK(error.empty(), kernel << ", " << name_of(chosen) << ": " << error);
    };
    constexpr int kSizes[][3] = {{1, 1, 1}, {16, 16, 8}, {17, 35, 13}, {40, 8, 21}};
    for (const auto& [m, n, k] : kSizes) check(run_simt(m, n, k, Mistake::kNone), "simt");
    for (const bool b_is_kn : {false, true}) {
      check(run_mma(1, 8, 8, b_is_kn, Mistake::kNone), "mma");
      check(run_mma(70, 40, 168, b_is_kn, Mistake::kNone), "mma");
      check(run_mma(33, 48, 77, b_is_kn, Mistake::kNone), "mma");
    }
    for (int variant = 0; variant < 8; ++variant) {
      const WgmmaVariant options{(variant & 1) != 0, (variant & 2) != 0, (variant & 4) != 0};
      check(run_wgmma(136, 72, 328, options, Mistake::kNone), "wgmma");
    }
    check(run_split(false, Mistake::kNone), "split, the last adds");
    check(run_split(true, Mistake::kNone), "split, the first waits");
    check(run_warp(Mistake::kNone), "warp");
  }
}

// ---- instructions ------------------------------------------------------------------------------

void test_warp_products() {
  settings() = {};
  for (const WarpMma mma :
       {WarpMma::kBFloat16, WarpMma::kFloat16, WarpMma::kTf32, WarpMma::kFloat64Narrow,
        WarpMma::kFloat64Tall, WarpMma::kFloat64Wide}) {
    const auto [m, n, k] = shape_of(mma);
    GlobalArray a(size(m, k, 8), "A"), b(size(k, n, 8), "B"), d(size(m, n, 8), "D");
    fill<double>(a, m, k, false, kSeedA);
    fill<double>(b, n, k, true, kSeedB);
    fill<double>(d, m, n, false, 0);
    CHECK(
        multiply_warp(mma, reinterpret_cast<double*>(a.data()), reinterpret_cast<double*>(b.data()),
                      reinterpret_cast<double*>(d.data()), nullptr) == 0,
        last_error());
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        const double got = reinterpret_cast<double*>(d.data())[i * n + j];
        CHECK(got == exact(i, j, k) + integer(i, j),
              "mma " << static_cast<int>(mma) << " (" << i << ", " << j << "): " << got);
      }
    }
  }
}

void test_matrices() {
  settings() = {};
  for (const bool load_transposed : {false, true}) {
    for (const bool store_transposed : {false, true}) {
      GlobalArray x(512, "x"), y(512, "y"), registers(512, "registers");
      auto* const in = reinterpret_cast<std::uint16_t*>(x.data());
      for (int i = 0; i < 256; ++i) in[i] = static_cast<std::uint16_t>(3 * i + 1);
      x.set_written();
      CHECK(move_matrices(load_transposed, store_transposed, in,
                          reinterpret_cast<std::uint16_t*>(y.data()),
                          reinterpret_cast<std::uint32_t*>(registers.data()), nullptr) == 0,
            last_error());
      const auto* const out = reinterpret_cast<std::uint16_t*>(y.data());
      const auto* const held = reinterpret_cast<std::uint16_t*>(registers.data());
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int i = 0; i < 8; ++i) {
          for (int j = 0; j < 8; ++j) {
            const std::uint16_t value = in[(8 * matrix + i) * 8 + j];
            const bool exchanged = load_transposed != store_transposed;
            CHECK(out[(8 * matrix + (exchanged ? j : i)) * 8 + (exchanged ? i : j)] == value,
                  "matrix " << matrix << " (" << i << ", " << j << ')');
            // Lane 4 g + t holds (g, 2 t) and (g, 2 t + 1).
            const int g = load_transposed ? j : i, column = load_transposed ? i : j;
            CHECK(held[((4 * g + column / 2) * 4 + matrix) * 2 + column % 2] == value,
                  "register of matrix " << matrix << " (" << i << ", " << j << ')');
          }
        }
      }
    }
  }
}

template <class T>
void test_one_tile(WgmmaCase shape) {
  GlobalArray a(size(64, 64, 2), "A"), b(size(shape.n, 64, 2), "B"), d(size(64, shape.n, 4), "D");
  fill<T>(a, 64, 64, shape.a_is_km, kSeedA);
  fill<T>(b, shape.n, 64, shape.b_is_kn, kSeedB);
  for (const bool late : {false, true}) {
    settings() = {.late_copies = late, .late_products = late};
    const std::string error = error_of(
        multiply_one_tile(shape, a.data(), b.data(), reinterpret_cast<float*>(d.data()), nullptr));
    const std::string wrong = error.empty() ? compare<float>(d, 64, shape.n, 64, 1) : error;
    CHECK(wrong.empty(), "wgmma 64x" << shape.n << "x16 " << name_of(shape.dtype) << " A "
                                     << (shape.a_is_km ? "km" : "mk") << " B "
                                     << (shape.b_is_kn ? "kn" : "nk") << " registers "
                                     << shape.a_in_registers << " swizzle " << shape.swizzle_bytes
                                     << ": " << wrong);
  }
}

void test_wgmma() {
  for (const int n : {8, 16, 32, 64, 96, 128, 192, 256}) {
    for (const int swizzle : {32, 64, 128}) {
      for (int variant = 0; variant < 4; ++variant) {
        const bool a_is_km = (variant & 1) != 0, b_is_kn = (variant & 2) != 0;
        test_one_tile<BFloat16>({n, DType::kBFloat16, a_is_km, b_is_kn, false, swizzle});
        test_one_tile<Float16>({n, DType::kFloat16, a_is_km, b_is_kn, false, swizzle});
        if (a_is_km) continue;  // registers have no layout
        test_one_tile<BFloat16>({n, DType::kBFloat16, false, b_is_kn, true, swizzle});
        test_one_tile<Float16>({n, DType::kFloat16, false, b_is_kn, true, swizzle});
      }
    }
  }
}

void test_boxes() {
  constexpr int kRows = 11, kColumns = 44;
  GlobalArray x(size(kRows, kColumns, 4), "x");
  auto* const in = reinterpret_cast<float*>(x.data());
  for (int i = 0; i < kRows * kColumns; ++i) in[i] = static_cast<float>(i + 1);
  x.set_written();
  for (const bool late : {false, true}) {
    settings() = {.late_copies = late};
    for (const int swizzle : {0, 32, 64, 128}) {
      const int width = swizzle == 0 ? 32 : swizzle / 4;
      constexpr int kPlaces[][2] = {{0, 0}, {2, 8}, {5, 36}, {-3, -4}, {11, 0}, {4, 44}};
      for (const auto& [row, column] : kPlaces) {
        GlobalArray y(size(8, width, 4), "y");
        CHECK(load_box(in, kRows, kColumns, swizzle, row, column,
                       reinterpret_cast<float*>(y.data()), nullptr) == 0,
              last_error());
        const auto* const out = reinterpret_cast<float*>(y.data());
        for (int r = 0; r < 8; ++r) {
          for (int c = 0; c < width; ++c) {
            const int i = row + r, j = column + c;
            const bool inside = i >= 0 && i < kRows && j >= 0 && j < kColumns;
            // Pieces of 4 floats change places within each 128 bytes' row of the pattern.
            const int piece = (r * width + c) / 4;
            const int mask = swizzle == 0 ? 0 : swizzle / 16 - 1;
            const int at = (piece ^ (piece / 8 & mask)) * 4 + c % 4;
            CHECK(out[at] == (inside ? in[i * kColumns + j] : 0.0f),
                  "box (" << row << ", " << column << ") swizzle " << swizzle << " (" << r << ", "
                          << c << ')');
          }
        }
      }
    }
  }
}

// ---- mistakes ----------------------------------------------------------------------------------

struct Planted {
  Mistake mistake;
  const char *kernel, *name, *what;
};

constexpr Planted kPlanted[] = {
#define NEURON_EXT_PLANTED(kernel, name, what) {Mistake::k##kernel##name, #kernel, #name, what},
    NEURON_EXT_MISTAKES(NEURON_EXT_PLANTED)
#undef NEURON_EXT_PLANTED
};

std::string run_planted(const Planted& planted) {
  const std::string kernel = planted.kernel;
  if (kernel == "Simt") return run_simt(35, 36, 21, planted.mistake);
  if (kernel == "Mma") {
    return run_mma(70, 40, 165, planted.mistake == Mistake::kMmaNotTransposed, planted.mistake);
  }
  if (kernel == "Wgmma") {
    const bool doubles_a = planted.mistake == Mistake::kWgmmaNoProxyFence ||
                           planted.mistake == Mistake::kWgmmaNoBarrierAfterRewrite;
    return run_wgmma(200, 136, 328, {false, false, doubles_a}, planted.mistake);
  }
  if (kernel == "Split") {
    return run_split(planted.mistake == Mistake::kSplitCounterNeverReached, planted.mistake);
  }
  return run_warp(planted.mistake);
}

/// What f returns, or how it ended: in a process of its own, which a mistake or the address
/// sanitizer may end.
std::string in_child(const std::function<std::string()>& f) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  std::cout.flush();
  const pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    dup2(ends[1], STDERR_FILENO);
    const std::string result = "returned " + f();
    const bool written = write(ends[1], result.data(), result.size()) >= 0;
    _exit(written ? 0 : 1);
  }
  close(ends[1]);
  std::string output;
  char buffer[4096];
  for (ssize_t count; (count = read(ends[0], buffer, sizeof(buffer))) > 0;) {
    output.append(buffer, static_cast<std::size_t>(count));
  }
  close(ends[0]);
  int status;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) return "ended by signal " + std::to_string(WTERMSIG(status));
  for (const char* const sign : {"AddressSanitizer: ", "runtime error: "}) {
    const std::size_t found = output.find(sign);
    if (found == std::string::npos) continue;
    return output.substr(found, output.find(" on address", found) - found).substr(0, 100);
  }
  if (output.rfind("returned ", 0) == 0) return output.substr(9);
  return "ended by itself";
}

void test_mistakes() {
  int reported = 0, by_default = 0;
  for (const Planted& planted : kPlanted) {
    std::string report, when;
    for (const Settings& chosen : all_settings()) {
      settings() = chosen;
      report = in_child([&] { return run_planted(planted); });
      when = name_of(chosen);
      if (!report.empty()) break;
    }
    if (report.empty()) when = "never";
    reported += report.empty() ? 0 : 1;
    by_default += when == "forward" ? 1 : 0;
    std::cout << planted.kernel << ' ' << planted.name << ": " << planted.what << "\n    " << when
              << ": " << report << '\n';
    // Only the build that sees every access can promise it.
    if (sees_accesses()) {
      CHECK(!report.empty(), planted.kernel << ' ' << planted.name << " isn't reported");
    }
  }
  std::cout << reported << " of " << std::size(kPlanted) << " mistakes reported, " << by_default
            << " of them with default settings\n";
}

}  // namespace

int main() {
  test_warp_products();
  test_matrices();
  test_boxes();
  test_wgmma();
  test_kernels();
  if (is_emulated()) test_mistakes();
  return failures == 0 ? 0 : 1;
}
