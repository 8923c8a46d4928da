// A stack of its own for each emulated thread, and the switch between them.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || !defined(__ELF__)
#include <ucontext.h>
#endif

namespace neuron_ext::emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// What the next resume() enters; it must end in finish(). What ran before is forgotten.
  void start(void (*entry)());
  void resume();   // from the scheduler, until suspend() or finish()
  void suspend();  // from inside, until the next resume()
  [[noreturn]] void finish();

  bool owns(std::uintptr_t address) const {
    return address - reinterpret_cast<std::uintptr_t>(stack_) < kStackBytes;
  }

  /// To be called first by what start() enters.
  void entered();

 private:
  static constexpr std::size_t kStackBytes = 256 << 10;

  void leave(bool for_good);

  std::byte* stack_;
#if defined(__x86_64__) && defined(__ELF__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  [[maybe_unused]] void* fake_stack_ = nullptr;  // the address sanitizer's
};

}  // namespace neuron_ext::emulator
