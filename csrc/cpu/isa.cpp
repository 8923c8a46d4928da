#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace neuron_ext::cpu {
namespace {

constexpr Isa kAllIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

#if defined(__x86_64__)

bool has_bits(std::uint64_t value, std::uint64_t bits) { return (value & bits) == bits; }

/// The register states that the operating system saves; XGETBV as bytes, since naming it needs
/// -mxsave.
std::uint64_t saved_states() {
  std::uint32_t low, high;
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

/// Whether this process may use tiles, whose state is so large that Linux saves it only for those
/// that ask. It says no where a signal stack of a thread is too small for that state.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  constexpr std::uint64_t kYmmStates = 0x6, kZmmStates = 0xe6, kTileStates = 0x60000;
  // By compilers' <cpuid.h> under different names.
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::kPortable;
  if (!has_bits(ecx, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C)) return Isa::kPortable;
  const std::uint64_t states = saved_states();
  if (!has_bits(states, kYmmStates)) return Isa::kPortable;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::kPortable;
  if (!has_bits(ebx, bit_AVX2)) return Isa::kPortable;
  if (!has_bits(states, kZmmStates)) return Isa::kAvx2;
  if (!has_bits(ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL)) return Isa::kAvx2;
  const bool has_tiles = has_bits(edx, kAmxBf16 | kAmxTile) && has_bits(states, kTileStates);
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return Isa::kAvx512;
  if (!has_bits(eax, bit_AVX512BF16)) return Isa::kAvx512;
  return has_tiles && may_use_tiles() ? Isa::kAmx : Isa::kAvx512Bf16;
}

#else

Isa detect() { return Isa::kPortable; }

#endif

Isa best_supported() {
  static const Isa best = detect();
  return best;
}

std::string list(const std::vector<Isa>& isas) {
  std::string names;
  for (Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
  return names;
}

std::string choices() {
  return "known are " + list({std::begin(kAllIsas), std::end(kAllIsas)}) + "; this CPU can run " +
         list(supported_isas());
}

Isa initial_isa() {
  const char* wanted = std::getenv("NEURON_EXT_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_supported();
  const std::optional<Isa> isa = parse_isa(wanted);
  if (!isa || !is_supported(*isa)) {
    throw std::invalid_argument(
        "NEURON_EXT_CPU_ISA=" + std::string(wanted) +
        (isa ? " is an instruction set that this CPU can't run: " : " is no instruction set: ") +
        choices());
  }
  return *isa;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "?";
}

std::optional<Isa> parse_isa(std::string_view name) {
  for (Isa isa : kAllIsas) {
    if (name == name_of(isa)) return isa;
  }
  return std::nullopt;
}

bool is_supported(Isa isa) { return isa <= best_supported(); }

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (Isa isa : kAllIsas) {
    if (is_supported(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_active_isa(Isa isa) {
  if (!is_supported(isa)) {
    throw std::invalid_argument(std::string(name_of(isa)) +
                                " is an instruction set that this CPU can't run: " + choices());
  }
  active().store(isa, std::memory_order_relaxed);
}

}  // namespace neuron_ext::cpu
