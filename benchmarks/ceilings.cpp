// What this machine can do at most: multiply-adds from registers and level-1 cache, and moving
// memory. Compiled by ceilings.py for one instruction set and called on as many threads as are
// wanted. Data is random: engines that multiply zeros or repeated values draw less power and run
// faster than they ever do on real data.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__unix__)
#include <sys/mman.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// kRows x kColumns sums: enough to hide an addition's latency, few enough to stay in registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 8, kColumns = 2;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRows = 3, kColumns = 4;
#else
constexpr int kVectorBytes = 16, kRows = 4, kColumns = 2;
#endif
constexpr int kBufferBytes = 8 << 10;  // stays in any level-1 cache

std::uint64_t next_random(std::uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

/// Uniform in [-1, 1), all bits of the mantissa random.
double next_uniform(std::uint64_t& state) {
  return static_cast<double>(static_cast<std::int64_t>(next_random(state))) * 0x1p-63;
}

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
std::uint16_t to_bf16(double value) {
  const float single = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  return static_cast<std::uint16_t>(bits >> 16);
}
#endif

/// Random numbers whose second half is the negative of the first, so that sums over the whole stay
/// small however often they are repeated; a sum that grew would soon stop changing.
template <class Element, class Convert>
void fill(Element* data, int count, std::uint64_t seed, const Convert& convert) {
  for (int i = 0; i < count / 2; ++i) {
    const double value = next_uniform(seed);
    data[i] = convert(value);
    data[i + count / 2] = convert(-value);
  }
}

template <class T>
struct Fma {
  using Element = T;
  typedef T Operand __attribute__((vector_size(kVectorBytes), may_alias));
  using Sum = Operand;
  static constexpr int kFlops = 2 * kVectorBytes / static_cast<int>(sizeof(T));
  static Element from(double value) { return static_cast<T>(value); }
  static Sum add(Sum sum, Operand a, Operand b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Dpbf16 {
  using Element = std::uint16_t;
  using Operand = __m512bh;
  using Sum = __m512;
  static constexpr int kFlops = 2 * 32;
  static Element from(double value) { return to_bf16(value); }
  static Sum add(Sum sum, Operand a, Operand b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

/// `passes` times over a buffer in level-1 cache, as the inner loop of a matrix product does it:
/// kColumns vectors loaded, kRows times as many multiply-adds. Returns the floating-point
/// operations done.
template <class Engine>
double multiply_add(std::int64_t passes) {
  using Element = typename Engine::Element;
  using Operand = typename Engine::Operand;
  using Sum = typename Engine::Sum;
  constexpr int kOperandBytes = static_cast<int>(sizeof(Operand));
  constexpr int kStepElements = kColumns * kOperandBytes / static_cast<int>(sizeof(Element));
  constexpr int kSteps = kBufferBytes / (kColumns * kOperandBytes);

  alignas(64) Element b[kBufferBytes / sizeof(Element)];
  alignas(64) Element a[kRows * kOperandBytes / sizeof(Element)];
  fill(b, sizeof b / sizeof(Element), 0x9e3779b97f4a7c15, Engine::from);
  fill(a, sizeof a / sizeof(Element), 0xd1b54a32d192ed03, Engine::from);

  __asm__ volatile("" : : "r"(a) : "memory");  // or the compiler works the numbers out itself
  Operand rows[kRows];
  std::memcpy(rows, a, sizeof rows);
  Sum sums[kRows][kColumns] = {};
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    for (int step = 0; step < kSteps; ++step) {
      const auto* columns = reinterpret_cast<const Operand*>(b + step * kStepElements);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          sums[i][j] = Engine::add(sums[i][j], rows[i], columns[j]);
        }
      }
    }
    __asm__ volatile("" : : "r"(b) : "memory");  // the next pass loads again
  }
  __asm__ volatile("" : : "r"(sums) : "memory");
  return static_cast<double>(passes) * kSteps * kRows * kColumns * Engine::kFlops;
}

#if defined(__AMX_BF16__)

struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/// Four tiles of sums, two by two, with all four operand tiles loaded for each step.
double tile_multiply_add(std::int64_t passes) {
  constexpr int kArchReqXcompPerm = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) != 0) return 0;

  constexpr int kTileElements = 16 * 32, kTiles = 16, kFlops = 2 * 16 * 16 * 32;
  alignas(64) std::uint16_t a[kTiles * kTileElements / 2];
  alignas(64) std::uint16_t b[kTiles * kTileElements / 2];
  fill(a, kTiles * kTileElements / 4, 0x9e3779b97f4a7c15, to_bf16);
  std::memcpy(a + kTiles * kTileElements / 4, a, sizeof a / 2);  // so that b's signs cancel
  fill(b, kTiles * kTileElements / 2, 0xd1b54a32d192ed03, to_bf16);

  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    for (int tile = 0; tile < kTiles / 2; tile += 2) {
      _tile_loadd(4, a + tile * kTileElements, 64);
      _tile_loadd(5, a + (tile + 1) * kTileElements, 64);
      _tile_loadd(6, b + tile * kTileElements, 64);
      _tile_loadd(7, b + (tile + 1) * kTileElements, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[16 * 16];
  _tile_stored(0, sums, 64);
  __asm__ volatile("" : : "r"(sums) : "memory");
  _tile_release();
  return static_cast<double>(passes) * kTiles / 4 * 4 * kFlops;
}

#endif

}  // namespace

// Each takes how often to go over its data, and returns the floating-point operations done; 0 where
// the instruction set that this file was compiled for has no such instruction.
extern "C" {

double peak_f32(std::int64_t passes) { return multiply_add<Fma<float>>(passes); }

double peak_f64(std::int64_t passes) { return multiply_add<Fma<double>>(passes); }

double peak_avx512_bf16([[maybe_unused]] std::int64_t passes) {
#if defined(__AVX512BF16__)
  return multiply_add<Dpbf16>(passes);
#else
  return 0;
#endif
}

double peak_amx_bf16([[maybe_unused]] std::int64_t passes) {
#if defined(__AMX_BF16__)
  return tile_multiply_add(passes);
#else
  return 0;
#endif
}

/// Reads `bytes`, a multiple of 512, `passes` times, from an address that is a multiple of 64.
void read_memory(const char* source, std::int64_t bytes, std::int64_t passes) {
  typedef std::uint64_t Vector __attribute__((vector_size(kVectorBytes), may_alias));
  Vector sums[8] = {};
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    for (std::int64_t at = 0; at < bytes; at += sizeof sums) {
      const auto* values = reinterpret_cast<const Vector*>(source + at);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) sums[i] ^= values[i];
    }
    __asm__ volatile("" : : "r"(source) : "memory");
  }
  __asm__ volatile("" : : "r"(sums) : "memory");
}

/// The same with eight places read side by side, 16 KiB apart, and the next eight fetched ahead:
/// what a large memory gives most at, for no prefetcher follows from one page of 4 KiB to the next.
/// `bytes` is a multiple of 128 KiB.
void read_side_by_side(const char* source, std::int64_t bytes, std::int64_t passes) {
  typedef std::uint64_t Vector __attribute__((vector_size(kVectorBytes), may_alias));
  constexpr std::int64_t kPlaces = 8, kApart = 16 << 10, kLine = 64;
  Vector sums[kPlaces] = {};
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    for (std::int64_t group = 0; group < bytes; group += kPlaces * kApart) {
      for (std::int64_t at = group; at < group + kApart; at += kLine) {
#pragma GCC unroll 8
        for (int i = 0; i < kPlaces; ++i) {
          const char* line = source + at + i * kApart;
          __builtin_prefetch(line + kPlaces * kApart, 0, 2);
#pragma GCC unroll 4
          for (int byte = 0; byte < kLine; byte += kVectorBytes) {
            sums[i] ^= *reinterpret_cast<const Vector*>(line + byte);
          }
        }
      }
    }
    __asm__ volatile("" : : "r"(source) : "memory");
  }
  __asm__ volatile("" : : "r"(sums) : "memory");
}

/// The C library's copy.
void copy_memory(const char* source, char* target, std::int64_t bytes, std::int64_t passes) {
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    std::memcpy(target, source, static_cast<std::size_t>(bytes));
    __asm__ volatile("" : : "r"(source), "r"(target) : "memory");
  }
}

/// A copy whose stores don't first read what they overwrite; both addresses multiples of 16.
void copy_memory_past_caches([[maybe_unused]] const char* source, [[maybe_unused]] char* target,
                             [[maybe_unused]] std::int64_t bytes,
                             [[maybe_unused]] std::int64_t passes) {
#if defined(__SSE2__)
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    for (std::int64_t at = 0; at < bytes; at += 16) {
      const __m128i value = _mm_load_si128(reinterpret_cast<const __m128i*>(source + at));
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + at), value);
    }
    _mm_sfence();
  }
#else
  copy_memory(source, target, bytes, passes);
#endif
}

/// Takes `bytes` from the system, in large pages if it has them, touches every page and gives them
/// back, `passes` times: what a result costs that is too large for the allocator to keep. Returns
/// whether there was memory.
bool take_fresh_memory([[maybe_unused]] std::int64_t bytes, [[maybe_unused]] std::int64_t passes) {
#if defined(__unix__)
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    const auto size = static_cast<std::size_t>(bytes);
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return false;
#if defined(MADV_HUGEPAGE)
    madvise(memory, size, MADV_HUGEPAGE);
#endif
    for (std::int64_t at = 0; at < bytes; at += 4096) {
      static_cast<volatile char*>(memory)[at] = 1;
    }
    munmap(memory, size);
  }
  return true;
#else
  return false;
#endif
}

}  // extern "C"
