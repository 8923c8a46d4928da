// What the instructions compute that a warp or a warpgroup executes together, and where each
// thread's part of their operands lies. Layouts as in csrc/cuda/ptx/mma.cuh and wgmma.cuh.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "machine.h"
#include "scalar.h"

namespace neuron_ext::emulator {

// ---- numbers -----------------------------------------------------------------------------------

float widen(Float16 x) { return cpu::widen(x); }
BFloat16 narrow_bf16(float x) { return cpu::narrow<BFloat16>(x); }
Float16 narrow_f16(float x) { return cpu::narrow<Float16>(x); }

std::uint32_t narrow_tf32(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (!std::isfinite(x)) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

float approximate(float x, int ulps) {
  const int direction = machine.settings.approximation;
  if (!std::isfinite(x) || x == 0) return x;  // these are exact
  for (int i = 0; i < ulps && direction != 0; ++i) {
    x = std::nextafter(x, direction < 0 ? -std::numeric_limits<float>::infinity()
                                        : std::numeric_limits<float>::infinity());
  }
  return x;
}

namespace {

float element(DType dtype, std::uint16_t bits) {
  return dtype == DType::kBFloat16 ? cpu::widen(BFloat16{bits}) : cpu::widen(Float16{bits});
}

/// Half h of a register.
float half(DType dtype, std::uint32_t bits, int h) {
  return element(dtype, static_cast<std::uint16_t>(bits >> 16 * h));
}

// ---- ldmatrix, stmatrix ------------------------------------------------------------------------

struct MatricesArgument {
  const void* row;
  std::uint32_t* registers;
  const std::uint32_t* stored;
  int count;
  bool transposed;
};

/// Calls f(matrix, lane, half of its register, address of that element).
template <class F>
void for_each_matrix_element(void** arguments, const F& f) {
  const auto& leader = *static_cast<MatricesArgument*>(arguments[0]);
  for (int matrix = 0; matrix < leader.count; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int h = 0; h < 2; ++h) {
        int row = lane / 4, column = 2 * (lane % 4) + h;
        if (leader.transposed) std::swap(row, column);
        const auto& owner = *static_cast<MatricesArgument*>(arguments[8 * matrix + row]);
        f(matrix, lane, h, static_cast<const std::byte*>(owner.row) + 2 * column);
      }
    }
  }
}

void check_rows(const void* row, int count, bool write, Site site) {
  if (lane() >= 8 * count) return;
  if (shared_address(row) % 16 != 0) {
    fail("matrices: a row that isn't aligned to 16 bytes, at %s", describe(site).c_str());
  }
  access(row, 16, write, site);
}

}  // namespace

void load_matrices(std::uint32_t* registers, int count, const void* row, bool transposed) {
  const Site site = __builtin_return_address(0);
  check_rows(row, count, false, site);
  MatricesArgument argument{row, registers, nullptr, count, transposed};
  collective("load_matrices", 32, ~0u, &argument, site, [](Block&, int, void** arguments) {
    for_each_matrix_element(arguments, [&](int matrix, int lane, int h, const std::byte* from) {
      std::uint32_t& target = static_cast<MatricesArgument*>(arguments[lane])->registers[matrix];
      std::uint16_t bits;
      std::memcpy(&bits, from, 2);
      target = h == 0 ? bits : (target & 0xffffu) | std::uint32_t{bits} << 16;
    });
  });
}

void store_matrices(void* row, int count, const std::uint32_t* registers, bool transposed) {
  const Site site = __builtin_return_address(0);
  check_rows(row, count, true, site);
  MatricesArgument argument{row, nullptr, registers, count, transposed};
  collective("store_matrices", 32, ~0u, &argument, site, [](Block&, int, void** arguments) {
    for_each_matrix_element(arguments, [&](int matrix, int lane, int h, const std::byte* to) {
      const auto bits = static_cast<std::uint16_t>(
          static_cast<MatricesArgument*>(arguments[lane])->stored[matrix] >> 16 * h);
      std::memcpy(const_cast<std::byte*>(to), &bits, 2);
    });
  });
}

// ---- mma.sync ----------------------------------------------------------------------------------

namespace {

template <class D, class O>
struct MmaArgument {
  D* d;
  const O* a;
  const O* b;
};

/// D += A B of one warp.
template <int kM, int kN, int kK, class D>
struct WarpProduct {
  D a[kM][kK], b[kK][kN];

  /// Thread 4 g + t has, of each pair of rows g and g + 8, columns 2 t and 2 t + 1.
  void add_to(D* d, int lane) const {
    for (int e = 0; e < kM / 8 * 2; ++e) {
      const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
      for (int k = 0; k < kK; ++k) d[e] += a[row][k] * b[k][column];
    }
  }
};

}  // namespace

void mma_16x8x16(DType dtype, float* d, const std::uint32_t* a, const std::uint32_t* b) {
  struct Argument {
    DType dtype;
    float* d;
    const std::uint32_t *a, *b;
  } argument{dtype, d, a, b};
  collective("mma 16x8x16", 32, ~0u, &argument, __builtin_return_address(0),
             [](Block&, int, void** arguments) {
               WarpProduct<16, 8, 16, float> product;
               for (int lane = 0; lane < 32; ++lane) {
                 const auto& own = *static_cast<Argument*>(arguments[lane]);
                 const int g = lane / 4, t = lane % 4;
                 for (int h = 0; h < 2; ++h) {
                   for (int r = 0; r < 4; ++r) {
                     product.a[g + 8 * (r % 2)][2 * t + h + 8 * (r / 2)] =
                         half(own.dtype, own.a[r], h);
                   }
                   for (int r = 0; r < 2; ++r) {
                     product.b[2 * t + h + 8 * r][g] = half(own.dtype, own.b[r], h);
                   }
                 }
               }
               for (int lane = 0; lane < 32; ++lane) {
                 product.add_to(static_cast<Argument*>(arguments[lane])->d, lane);
               }
             });
}

void mma_16x8x8_tf32(float* d, const std::uint32_t* a, const std::uint32_t* b) {
  using Argument = MmaArgument<float, std::uint32_t>;
  Argument argument{d, a, b};
  collective("mma tf32", 32, ~0u, &argument, __builtin_return_address(0),
             [](Block&, int, void** arguments) {
               const auto tf32 = [](std::uint32_t bits) {
                 return std::bit_cast<float>(bits & ~0x1fffu);
               };
               WarpProduct<16, 8, 8, float> product;
               for (int lane = 0; lane < 32; ++lane) {
                 const auto& own = *static_cast<Argument*>(arguments[lane]);
                 const int g = lane / 4, t = lane % 4;
                 for (int r = 0; r < 4; ++r) {
                   product.a[g + 8 * (r % 2)][t + 4 * (r / 2)] = tf32(own.a[r]);
                 }
                 for (int r = 0; r < 2; ++r) product.b[t + 4 * r][g] = tf32(own.b[r]);
               }
               for (int lane = 0; lane < 32; ++lane) {
                 product.add_to(static_cast<Argument*>(arguments[lane])->d, lane);
               }
             });
}

void mma_8x8x4(double* d, double a, double b) {
  using Argument = MmaArgument<double, double>;
  Argument argument{d, &a, &b};
  collective("mma f64 8x8x4", 32, ~0u, &argument, __builtin_return_address(0),
             [](Block&, int, void** arguments) {
               WarpProduct<8, 8, 4, double> product;
               for (int lane = 0; lane < 32; ++lane) {
                 const auto& own = *static_cast<Argument*>(arguments[lane]);
                 product.a[lane / 4][lane % 4] = *own.a;
                 product.b[lane % 4][lane / 4] = *own.b;
               }
               for (int lane = 0; lane < 32; ++lane) {
                 product.add_to(static_cast<Argument*>(arguments[lane])->d, lane);
               }
             });
}

void mma_16x8x16(double* d, const double* a, const double* b) {
  using Argument = MmaArgument<double, double>;
  Argument argument{d, a, b};
  collective("mma f64 16x8x16", 32, ~0u, &argument, __builtin_return_address(0),
             [](Block&, int, void** arguments) {
               WarpProduct<16, 8, 16, double> product;
               for (int lane = 0; lane < 32; ++lane) {
                 const auto& own = *static_cast<Argument*>(arguments[lane]);
                 const int g = lane / 4, t = lane % 4;
                 for (int e = 0; e < 8; ++e) product.a[g + 8 * (e % 2)][t + 4 * (e / 2)] = own.a[e];
                 for (int e = 0; e < 4; ++e) product.b[t + 4 * e][g] = own.b[e];
               }
               for (int lane = 0; lane < 32; ++lane) {
                 product.add_to(static_cast<Argument*>(arguments[lane])->d, lane);
               }
             });
}

// ---- wgmma -------------------------------------------------------------------------------------

namespace {

/// A matrix descriptor, read as the tensor core reads it: 16-bit elements in shared memory.
class Descriptor {
 public:
  Descriptor(std::uint64_t bits, bool is_mn_major)
      : start_(static_cast<std::size_t>(bits & 0x3fff) << 4),
        span_stride_(static_cast<std::size_t>(bits >> 16 & 0x3fff) << 4),
        block_stride_(static_cast<std::size_t>(bits >> 32 & 0x3fff) << 4),
        is_mn_major_(is_mn_major) {
    constexpr std::size_t kSpans[] = {16, 128, 64, 32};
    span_ = kSpans[bits >> 62];
    if (span_ > 16 && start_ / 128 % (span_ / 16) != 0) {
      fail("wgmma: its tile at shared+%zu doesn't begin where the swizzle of %zu bytes does",
           start_, span_);
    }
    if (span_ > 16 && !is_mn_major && start_ % span_ + 32 > span_) {
      fail("wgmma: a step along k at shared+%zu leaves the swizzle's span", start_);
    }
  }

  /// The offset of element (mn, k) of the tile.
  std::size_t at(int mn, int k) const {
    const auto i = static_cast<std::size_t>(is_mn_major_ ? mn : k);  // along a row of the span
    const auto row = static_cast<std::size_t>(is_mn_major_ ? k : mn);
    std::size_t offset = start_ + row % 8 * span_;
    if (span_ > 16 && !is_mn_major_) {
      offset += i * 2 + row / 8 * block_stride_;  // a tile's 16 along k stay in the span
    } else if (span_ == 16 && is_mn_major_) {
      offset += i * 2 % span_ + i * 2 / span_ * block_stride_ + row / 8 * span_stride_;
    } else {
      offset += i * 2 % span_ + i * 2 / span_ * span_stride_ + row / 8 * block_stride_;
    }
    return offset ^ (offset >> 7 & (span_ / 16 - 1)) << 4;
  }

 private:
  std::size_t start_, span_stride_, block_stride_, span_;
  bool is_mn_major_;
};

float element_at(const Block& block, DType dtype, const Descriptor& tile, int mn, int k) {
  const std::size_t offset = tile.at(mn, k);
  if (offset + 2 > kArenaBytes) fail("wgmma: reads beyond shared memory, at shared+%zu", offset);
  std::uint16_t bits;
  std::memcpy(&bits, block.shared + offset, 2);
  return element(dtype, bits);
}

constexpr int kM = 64, kK = 16;

}  // namespace

void for_each_piece(const Product& product, const std::function<void(std::size_t offset)>& f) {
  const auto visit = [&](std::uint64_t descriptor, bool is_mn_major, int count) {
    const Descriptor tile(descriptor, is_mn_major);
    for (int mn = 0; mn < count; mn += is_mn_major ? 8 : 1) {
      for (int k = 0; k < kK; k += is_mn_major ? 1 : 8) f(tile.at(mn, k));
    }
  };
  if (product.a_registers[0] == nullptr) visit(product.a, product.a_is_mn_major, kM);
  visit(product.b, product.b_is_mn_major, product.n);
}

void multiply(Block& block, const Product& product) {
  static float a[kM][kK], b[256][kK];
  if (product.a_registers[0] == nullptr) {
    const Descriptor tile(product.a, product.a_is_mn_major);
    for (int i = 0; i < kM; ++i) {
      for (int k = 0; k < kK; ++k) a[i][k] = element_at(block, product.dtype, tile, i, k);
    }
  } else {
    for (int thread = 0; thread < kWarpgroup; ++thread) {
      const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
      for (int r = 0; r < 4; ++r) {
        const std::uint32_t bits = product.a_registers[static_cast<std::size_t>(thread)][r];
        for (int h = 0; h < 2; ++h) {
          a[row + 8 * (r % 2)][2 * t + h + 8 * (r / 2)] = half(product.dtype, bits, h);
        }
      }
    }
  }
  const Descriptor tile(product.b, product.b_is_mn_major);
  for (int j = 0; j < product.n; ++j) {
    for (int k = 0; k < kK; ++k) b[j][k] = element_at(block, product.dtype, tile, j, k);
  }
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    float* const d = product.d[static_cast<std::size_t>(thread)];
    for (int e = 0; e < product.n / 2; ++e) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (e / 2 % 2);
      const int column = e / 4 * 8 + 2 * (thread % 4) + e % 2;
      float sum = product.accumulate ? d[e] : 0.0f;
      for (int k = 0; k < kK; ++k) sum += a[row][k] * b[column][k];
      d[e] = sum;
    }
  }
}

}  // namespace neuron_ext::emulator
