// AMX for unchanged programs on a CPU without it. Preloaded (run.py), this library gives the
// answers of a CPU with AMX where neuron_ext asks what there is, and carries out the instructions
// on tiles, which trap. So what runs is the object code that users get, from its detection to its
// last product; only its times say nothing. A CPU with AMX of its own is left alone, as is one
// without AVX512_BF16, which the kernels need too.
//
//   detection     CPUID and XGETBV don't trap. neuron_ext asks while it initializes a static
//                 variable, so the statics of its objects are initialized one instruction at a
//                 time.
//   instructions  SIGILL. What they do is defined in volume 2 of Intel's manual.
//   misuse        ends the process: tiles without the system's permission, in use though not
//                 configured, configured twice, of shapes that don't fit, or never released.

#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <x86intrin.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace {

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;
constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // of CPUID's leaf 7, in edx

struct Tile {
  int rows, row_bytes;
  alignas(64) std::uint8_t data[kMaxRows][kMaxRowBytes];
};

struct Tiles {
  bool configured;
  Tile tile[kTiles];
};

// A handler of signals must not allocate, as other thread_local variables do at first use.
__attribute__((tls_model("initial-exec"))) thread_local Tiles tiles;

std::atomic<bool> permitted{false};
std::atomic<int> threads_with_tiles{0};
bool emulates = false;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

// ---- decoding -----------------------------------------------------------------------------------

/// An instruction with a VEX prefix of three bytes. Bits of the prefix that say which register it
/// is are inverted.
class Instruction {
 public:
  Instruction(const std::uint8_t* bytes, const greg_t* registers)
      : bytes_(bytes), registers_(registers) {}

  /// Of the map 0f 38, with W and L zero.
  bool may_be_on_tiles() const {
    return bytes_[0] == 0xc4 && (bytes_[1] & 0x1f) == 2 && (bytes_[2] & 0x84) == 0;
  }
  /// The opcode, and in bits 8 and 9 which prefix it has: none, 66, f3 or f2.
  int opcode() const { return bytes_[3] | (bytes_[2] & 3) << 8; }
  bool is_in_memory() const { return mod() != 3; }
  bool has_index() const { return is_in_memory() && rm() == 4; }
  int reg() const { return bytes_[4] >> 3 & 7; }
  int rm() const { return bytes_[4] & 7; }
  int second_source() const { return ~bytes_[2] >> 3 & 15; }

  std::int64_t length() const { return 5 + has_index() + displacement_bytes(); }

  std::uint8_t* base() const {
    std::int64_t address = displacement();
    if (mod() != 0 || low_base() != 5) {
      address += value(low_base() | (~bytes_[1] >> 2 & 8));
    } else if (!has_index()) {
      address += reinterpret_cast<std::int64_t>(bytes_) + length();
    }
    return reinterpret_cast<std::uint8_t*>(address);
  }
  /// What is added to the base; instructions on tiles take it for the stride of rows.
  std::int64_t index() const {
    const int number = (bytes_[5] >> 3 & 7) | (~bytes_[1] >> 3 & 8);
    return number == 4 ? 0 : value(number) << (bytes_[5] >> 6);
  }

 private:
  int mod() const { return bytes_[4] >> 6; }
  int low_base() const { return has_index() ? bytes_[5] & 7 : rm(); }
  int displacement_bytes() const {
    if (mod() == 1) return 1;
    return mod() == 2 || (mod() == 0 && low_base() == 5) ? 4 : 0;
  }
  std::int64_t displacement() const {
    const std::uint8_t* const place = bytes_ + 5 + has_index();
    std::int32_t displacement = 0;
    if (displacement_bytes() == 4) std::memcpy(&displacement, place, 4);
    return displacement_bytes() == 1 ? static_cast<std::int8_t>(*place) : displacement;
  }
  std::int64_t value(int number) const {
    constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                               REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                               REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[kPlaces[number]];
  }

  const std::uint8_t* bytes_;
  const greg_t* registers_;
};

// ---- instructions -------------------------------------------------------------------------------

/// `memory`: palette, first row, 14 bytes of zeros; then for 16 tiles the bytes of a row, in two
/// bytes each, and for 16 tiles the rows.
void configure(const std::uint8_t* memory) {
  if (!permitted) fail("tiles are configured without the system's permission");
  if (tiles.configured) fail("tiles are configured twice");
  if (memory[0] != 1 || memory[1] != 0) fail("tiles of another palette, or from another row on");
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = memory[16 + 2 * i] | memory[17 + 2 * i] << 8, rows = memory[48 + i];
    if ((rows == 0) != (row_bytes == 0) || rows > kMaxRows || row_bytes > kMaxRowBytes ||
        row_bytes % 4 != 0 || (i >= kTiles && rows != 0)) {
      fail("a tile of a shape that there isn't");
    }
    if (i < kTiles) tiles.tile[i].rows = rows, tiles.tile[i].row_bytes = row_bytes;
  }
  tiles.configured = true;
  ++threads_with_tiles;
}

void release() {
  if (!tiles.configured) fail("tiles are released that aren't configured");
  std::memset(&tiles, 0, sizeof tiles);
  --threads_with_tiles;
}

Tile& tile(int number) {
  if (!tiles.configured) fail("tiles are used that aren't configured");
  if (number >= kTiles || tiles.tile[number].rows == 0) fail("a tile without a shape is used");
  return tiles.tile[number];
}

void zero(Tile& tile) { std::memset(tile.data, 0, sizeof tile.data); }

void load(Tile& tile, const std::uint8_t* base, std::int64_t stride) {
  zero(tile);
  for (int i = 0; i < tile.rows; ++i) {
    std::memcpy(tile.data[i], base + i * stride, static_cast<std::size_t>(tile.row_bytes));
  }
}

void store(const Tile& tile, std::uint8_t* base, std::int64_t stride) {
  for (int i = 0; i < tile.rows; ++i) {
    std::memcpy(base + i * stride, tile.data[i], static_cast<std::size_t>(tile.row_bytes));
  }
}

/// Even and odd k are summed apart, from zero, one rounding to a multiply-add. It rounds to nearest
/// and takes subnormal numbers for zeros, whatever MXCSR says, which the end of the handler brings
/// back.
__attribute__((target("avx512f"))) void multiply_add(Tile& d, const Tile& a, const Tile& b) {
  if (d.rows != a.rows || d.row_bytes != b.row_bytes || a.row_bytes != 4 * b.rows) {
    fail("tiles are multiplied whose shapes don't fit");
  }
  typedef std::uint32_t Words __attribute__((vector_size(64)));
  constexpr unsigned kMasked = 0x1f80, kFlushResults = 0x8000, kFlushOperands = 0x40;
  _mm_setcsr(kMasked | kFlushResults | kFlushOperands);
  for (int i = 0; i < d.rows; ++i) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int p = 0; p < b.rows; ++p) {
      std::uint32_t pair;
      std::memcpy(&pair, a.data[i] + 4 * p, 4);
      const Words x = pair + Words{}, y = reinterpret_cast<Words>(_mm512_load_si512(b.data[p]));
      even = _mm512_fmadd_ps(reinterpret_cast<__m512>(x << 16), reinterpret_cast<__m512>(y << 16),
                             even);
      odd = _mm512_fmadd_ps(reinterpret_cast<__m512>(x & 0xffff0000),
                            reinterpret_cast<__m512>(y & 0xffff0000), odd);
    }
    const __m512 sums = _mm512_load_ps(d.data[i]);
    _mm512_store_ps(d.data[i], _mm512_add_ps(sums, _mm512_add_ps(even, odd)));
  }
}

/// False if it's no instruction on tiles.
bool carry_out(const Instruction& x) {
  if (!x.may_be_on_tiles()) return false;
  constexpr int kNone = 0x000, k66 = 0x100, kF3 = 0x200, kF2 = 0x300;
  switch (x.opcode()) {
    case kNone | 0x49:  // ldtilecfg, tilerelease
      x.is_in_memory() ? configure(x.base() + (x.has_index() ? x.index() : 0)) : release();
      return true;
    case kF2 | 0x49:
      if (x.is_in_memory()) return false;
      zero(tile(x.reg()));
      return true;
    case kF2 | 0x4b:  // tileloadd
    case k66 | 0x4b:  // tileloaddt1
      if (!x.has_index()) return false;
      load(tile(x.reg()), x.base(), x.index());
      return true;
    case kF3 | 0x4b:  // tilestored
      if (!x.has_index()) return false;
      store(tile(x.reg()), x.base(), x.index());
      return true;
    case kF3 | 0x5c:  // tdpbf16ps
      if (x.is_in_memory()) return false;
      multiply_add(tile(x.reg()), tile(x.rm()), tile(x.second_source()));
      return true;
    default:
      return false;
  }
}

/// As many as follow each other: to trap takes longer than what most of them do.
void on_illegal_instruction(int signal, siginfo_t*, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const greg_t first = registers[REG_RIP];
  for (;;) {
    const Instruction instruction(reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]),
                                  registers);
    if (!carry_out(instruction)) break;
    registers[REG_RIP] += instruction.length();
  }
  if (registers[REG_RIP] == first) ::signal(signal, SIG_DFL);  // it will be raised again
}

// ---- detection ----------------------------------------------------------------------------------

/// Whether it is code of the module for Python, of the library or of a program of tests.
bool is_in_neuron_ext(const void* code) {
  Dl_info object;
  if (dladdr(code, &object) == 0) return false;
  const std::string_view path = object.dli_fname;
  return path.find("/neuron_ext/_C.") != path.npos ||
         path.find("/libneuron_torch.so") != path.npos || path.find(".so") == path.npos;
}

/// Whether SIGTRAP is raised after every instruction.
void set_tracing(bool on) {
  constexpr unsigned long long kTrap = 0x100;
  __writeeflags(on ? __readeflags() | kTrap : __readeflags() & ~kTrap);
}

/// Carries out CPUID and XGETBV as they come next.
void on_traced_instruction(int, siginfo_t*, void* context) {
  constexpr std::uint8_t kCpuid[] = {0x0f, 0xa2}, kXgetbv[] = {0x0f, 0x01, 0xd0};
  constexpr std::uint32_t kTileStates = 0x60000;
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* const code = reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]);
  if (std::memcmp(code, kCpuid, sizeof kCpuid) == 0) {
    const auto leaf = static_cast<unsigned>(registers[REG_RAX]);
    const auto part = static_cast<unsigned>(registers[REG_RCX]);
    unsigned eax, ebx, ecx, edx;
    __cpuid_count(leaf, part, eax, ebx, ecx, edx);
    if (leaf == 7 && part == 0) edx |= kAmxBf16 | kAmxTile;
    registers[REG_RAX] = eax, registers[REG_RBX] = ebx;
    registers[REG_RCX] = ecx, registers[REG_RDX] = edx;
    registers[REG_RIP] += sizeof kCpuid;
  } else if (std::memcmp(code, kXgetbv, sizeof kXgetbv) == 0) {
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    registers[REG_RAX] = low | kTileStates, registers[REG_RDX] = high;
    registers[REG_RIP] += sizeof kXgetbv;
  }
}

void on_signal(int signal, void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO;
  action.sa_sigaction = handler;
  sigaction(signal, &action, nullptr);
}

__attribute__((constructor)) void start() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kAmxTile)) return;
  if (!__builtin_cpu_supports("avx512bf16")) return;
  on_signal(SIGILL, on_illegal_instruction);
  on_signal(SIGTRAP, on_traced_instruction);
  emulates = true;
}

__attribute__((destructor)) void end() {
  if (threads_with_tiles != 0) fail("tiles were never released");
}

/// The function that the one of this name below stands before.
template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

// ---- functions that are called instead of the libraries' ----------------------------------------

extern "C" {

int __cxa_guard_acquire(std::int64_t* guard) {
  const int initializes = next<int(std::int64_t*)>(__func__)(guard);
  if (initializes && emulates && is_in_neuron_ext(__builtin_return_address(0))) set_tracing(true);
  return initializes;
}

void __cxa_guard_release(std::int64_t* guard) {
  set_tracing(false);
  next<void(std::int64_t*)>(__func__)(guard);
}

void __cxa_guard_abort(std::int64_t* guard) {
  set_tracing(false);
  next<void(std::int64_t*)>(__func__)(guard);
}

/// Permits the use of tiles, which Linux does only where there are any.
long syscall(long number, ...) noexcept {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  long x[6];
  va_list arguments;
  va_start(arguments, number);
  for (long& argument : x) argument = va_arg(arguments, long);
  va_end(arguments);
  if (emulates && number == SYS_arch_prctl && x[0] == kRequestPermission && x[1] == kTileData) {
    permitted = true;
    return 0;
  }
  return next<long(long, ...)>(__func__)(number, x[0], x[1], x[2], x[3], x[4], x[5]);
}

/// Keeps SIGILL from Python's faulthandler, which pytest turns on.
int sigaction(int signal, const struct sigaction* action, struct sigaction* old) noexcept {
  if (emulates && (signal == SIGILL || signal == SIGTRAP)) action = nullptr;
  return next<int(int, const struct sigaction*, struct sigaction*)>(__func__)(signal, action, old);
}
}
