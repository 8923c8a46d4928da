// sm_90a's tensor cores: a warpgroup multiplies tiles that lie in shared memory, asynchronously,
// into sums in its registers.
//
//   wgmma_fence();                                  // before each group
//   for (k16 of the tile) wgmma_64xNx16<...>(d, a_descriptor, b_descriptor, accumulate);
//   wgmma_commit();                                 // ends the group
//   wgmma_wait<kPending>();                         // then tiles may be overwritten and d be read
//
// All 128 threads execute all of it with the same descriptors. Between an instruction and the wait
// that covers it, d (and A in registers) must not be touched, nor copied to other variables.
// Sums of thread 32 w + 4 g + t: d[4 j + e] is D(16 w + g + 8 (e / 2), 8 j + 2 t + e % 2).
#pragma once

#include "target.cuh"
#include "tma.cuh"

namespace neuron_ext::cuda::ptx {

/// Which index of an operand is contiguous in shared memory: K (x and w of x wᵀ), or M and N.
enum class Major : std::uint8_t { kK = 0, kMN = 1 };

/// Where an operand's tile for one instruction begins and how it lies in shared memory: in the form
/// in which tma_load leaves it, boxes of rows of one swizzle span, 8 rows (of 16 bytes, the span if
/// there is none) forming a block.
///
///   kK, swizzled     rows are m or n. The next 8 of them: block_stride, 8 spans within one box. A
///                    step of 16 along k: start + 32 bytes. span_stride isn't used.
///   kMN, swizzled    rows are k. The next 8: block_stride. What lies beyond a span of m or n (64
///                    elements for 128 bytes): span_stride. A step of 16 along k: start + 16 rows.
///   kK, kNone        8 x 16 bytes of contiguous rows: the next 8 m or n: block_stride; the next 16
///                    bytes along k: span_stride.
///   kMN, kNone       the next 16 bytes along m or n: block_stride; the next 8 k: span_stride.
///
/// Strides are in bytes, multiples of 16. `shared` lies in the first of 8 rows of a period, and the
/// period is aligned to 8 spans.
NEURON_EXT_DEVICE std::uint64_t matrix_descriptor(const void* shared, int block_stride,
                                                  int span_stride, Swizzle swizzle) {
  constexpr std::uint64_t kLayouts[] = {0, 3, 2, 1};
  constexpr std::uint32_t kFields = 0x3ffff;  // 18 bits of an address, of which 4 aren't stored
  return (shared_address(shared) & kFields) >> 4 |
         static_cast<std::uint64_t>((span_stride & kFields) >> 4) << 16 |
         static_cast<std::uint64_t>((block_stride & kFields) >> 4) << 32 |
         kLayouts[static_cast<int>(swizzle)] << 62;
}

/// The descriptor of a tile that lies `bytes` further on.
NEURON_EXT_DEVICE std::uint64_t advance(std::uint64_t descriptor, int bytes) {
  return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}

/// Earlier accesses to the registers that follow in wgmmas are done.
NEURON_EXT_DEVICE void wgmma_fence() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

NEURON_EXT_DEVICE void wgmma_commit() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/// Waits until at most the kPending last groups are unfinished.
template <int kPending>
NEURON_EXT_DEVICE void wgmma_wait() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::wgmma_wait(kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

/// A shape and type's instructions; see wgmma_64xNx16 below.
template <int kN, DType kDType>
struct Wgmma;

#ifdef NEURON_EXT_CUDA_EMULATOR

template <int kN, DType kDType>
struct Wgmma {
  template <Major kMajorA, Major kMajorB>
  static void multiply(float* d, std::uint64_t a, std::uint64_t b, bool accumulate) {
    emulator::wgmma(kN, kDType, d, a, kMajorA == Major::kMN, b, kMajorB == Major::kMN, accumulate);
  }
  template <Major kMajorB>
  static void multiply(float* d, const std::uint32_t* a, std::uint64_t b, bool accumulate) {
    emulator::wgmma(kN, kDType, d, a, b, kMajorB == Major::kMN, accumulate);
  }
};

#else

// The instruction names each register of its sums, so a shape needs their list, as text and as
// operands, and the numbers of the operands that follow.
#define NEURON_EXT_LIST_4 "%0, %1, %2, %3"
#define NEURON_EXT_LIST_8 NEURON_EXT_LIST_4 ", %4, %5, %6, %7"
#define NEURON_EXT_LIST_16 \
  NEURON_EXT_LIST_8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NEURON_EXT_LIST_32 \
  NEURON_EXT_LIST_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NEURON_EXT_LIST_48 \
  NEURON_EXT_LIST_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NEURON_EXT_LIST_64 \
  NEURON_EXT_LIST_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NEURON_EXT_LIST_96                                                           \
  NEURON_EXT_LIST_64                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NEURON_EXT_LIST_128                                                                      \
  NEURON_EXT_LIST_96                                                                             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"

#define NEURON_EXT_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NEURON_EXT_SUMS_8(i) NEURON_EXT_SUMS_4(i), NEURON_EXT_SUMS_4(i + 4)
#define NEURON_EXT_SUMS_16(i) NEURON_EXT_SUMS_8(i), NEURON_EXT_SUMS_8(i + 8)
#define NEURON_EXT_SUMS_32(i) NEURON_EXT_SUMS_16(i), NEURON_EXT_SUMS_16(i + 16)
#define NEURON_EXT_SUMS_48(i) NEURON_EXT_SUMS_32(i), NEURON_EXT_SUMS_16(i + 32)
#define NEURON_EXT_SUMS_64(i) NEURON_EXT_SUMS_32(i), NEURON_EXT_SUMS_32(i + 32)
#define NEURON_EXT_SUMS_96(i) NEURON_EXT_SUMS_64(i), NEURON_EXT_SUMS_32(i + 64)
#define NEURON_EXT_SUMS_128(i) NEURON_EXT_SUMS_64(i), NEURON_EXT_SUMS_64(i + 64)

// clang-format off: it would break the instructions' text at every operand
// o0 to o6: the numbers of the operands that follow the sums.
#define NEURON_EXT_WGMMA(n, count, dtype, type, o0, o1, o2, o3, o4, o5, o6)                      \
  template <>                                                                                    \
  struct Wgmma<n, dtype> {                                                                       \
    template <Major kMajorA, Major kMajorB>                                                      \
    NEURON_EXT_DEVICE static void multiply(float* d, std::uint64_t a, std::uint64_t b,           \
                                           bool accumulate) {                                    \
      asm volatile(                                                                              \
          "{\n"                                                                                  \
          ".reg .pred accumulate;\n"                                                             \
          "setp.ne.b32 accumulate, %" #o2 ", 0;\n"                                               \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                        \
          " {" NEURON_EXT_LIST_##count "}, %" #o0 ", %" #o1                                      \
          ", accumulate, 1, 1, %" #o3 ", %" #o4 ";\n"                                            \
          "}"                                                                                    \
          : NEURON_EXT_SUMS_##count(0)                                                           \
          : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorA)),   \
            "n"(static_cast<int>(kMajorB)));                                                     \
    }                                                                                            \
    template <Major kMajorB>                                                                     \
    NEURON_EXT_DEVICE static void multiply(float* d, const std::uint32_t* a, std::uint64_t b,    \
                                           bool accumulate) {                                    \
      asm volatile(                                                                              \
          "{\n"                                                                                  \
          ".reg .pred accumulate;\n"                                                             \
          "setp.ne.b32 accumulate, %" #o5 ", 0;\n"                                               \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                        \
          " {" NEURON_EXT_LIST_##count "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4      \
          ", accumulate, 1, 1, %" #o6 ";\n"                                                      \
          "}"                                                                                    \
          : NEURON_EXT_SUMS_##count(0)                                                           \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                                  \
            "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorB)));                  \
    }                                                                                            \
  };
#define NEURON_EXT_WGMMA_TYPES(n, count, ...)                        \
  NEURON_EXT_WGMMA(n, count, DType::kBFloat16, "bf16", __VA_ARGS__)  \
  NEURON_EXT_WGMMA(n, count, DType::kFloat16, "f16", __VA_ARGS__)

NEURON_EXT_WGMMA_TYPES(8, 4, 4, 5, 6, 7, 8, 9, 10)
NEURON_EXT_WGMMA_TYPES(16, 8, 8, 9, 10, 11, 12, 13, 14)
NEURON_EXT_WGMMA_TYPES(32, 16, 16, 17, 18, 19, 20, 21, 22)
NEURON_EXT_WGMMA_TYPES(64, 32, 32, 33, 34, 35, 36, 37, 38)
NEURON_EXT_WGMMA_TYPES(96, 48, 48, 49, 50, 51, 52, 53, 54)
NEURON_EXT_WGMMA_TYPES(128, 64, 64, 65, 66, 67, 68, 69, 70)
NEURON_EXT_WGMMA_TYPES(192, 96, 96, 97, 98, 99, 100, 101, 102)
NEURON_EXT_WGMMA_TYPES(256, 128, 128, 129, 130, 131, 132, 133, 134)
// clang-format on

#undef NEURON_EXT_WGMMA_TYPES
#undef NEURON_EXT_WGMMA
#undef NEURON_EXT_SUMS_128
#undef NEURON_EXT_SUMS_96
#undef NEURON_EXT_SUMS_64
#undef NEURON_EXT_SUMS_48
#undef NEURON_EXT_SUMS_32
#undef NEURON_EXT_SUMS_16
#undef NEURON_EXT_SUMS_8
#undef NEURON_EXT_SUMS_4
#undef NEURON_EXT_LIST_128
#undef NEURON_EXT_LIST_96
#undef NEURON_EXT_LIST_64
#undef NEURON_EXT_LIST_48
#undef NEURON_EXT_LIST_32
#undef NEURON_EXT_LIST_16
#undef NEURON_EXT_LIST_8
#undef NEURON_EXT_LIST_4

#endif

/// D = A B, or D += A B where `accumulate`; A is 64 x 16, B 16 x kN; kDType is 16-bit, kN one of 8,
/// 16, 32, 64, 96, 128, 192, 256.
template <int kN, DType kDType, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
NEURON_EXT_DEVICE void wgmma_64xNx16(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b,
                                     bool accumulate) {
  Wgmma<kN, kDType>::template multiply<kMajorA, kMajorB>(d, a, b, accumulate);
}

/// The same with A in registers, each warp's 16 rows as a fragment of mma.cuh's 16 x 16.
template <int kN, DType kDType, Major kMajorB = Major::kK>
NEURON_EXT_DEVICE void wgmma_64xNx16(float (&d)[kN / 2], const std::uint32_t (&a)[4],
                                     std::uint64_t b, bool accumulate) {
  Wgmma<kN, kDType>::template multiply<kMajorB>(d, a, b, accumulate);
}

}  // namespace neuron_ext::cuda::ptx
