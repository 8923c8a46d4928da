#include "fiber.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define NEURON_EXT_WITH_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NEURON_EXT_WITH_ASAN 1
#endif
#endif
#ifdef NEURON_EXT_WITH_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__ELF__)
// Saves what a call must preserve, changes stacks and returns there: 50 ns for a barrier and
// thread, where swapcontext, which makes a system call for the signal mask, takes 450.
extern "C" void neuron_ext_switch_stacks(void** from, void* to);
asm(R"(
.text
.globl neuron_ext_switch_stacks
.type neuron_ext_switch_stacks,@function
neuron_ext_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size neuron_ext_switch_stacks, .-neuron_ext_switch_stacks
)");
#endif

namespace neuron_ext::emulator {
namespace {

constexpr std::size_t kGuardBytes = 4096;  // below the stack: running over it is a fault

#if defined(__x86_64__) && defined(__ELF__)
void* scheduler_stack_pointer;
#else
ucontext_t scheduler_context;
#endif

#ifdef NEURON_EXT_WITH_ASAN
const void* scheduler_stack;
std::size_t scheduler_stack_bytes;
void* scheduler_fake_stack;
#endif

}  // namespace

Fiber::Fiber() {
  void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<std::byte*>(memory) + kGuardBytes;
}

Fiber::~Fiber() { munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes); }

void Fiber::start(void (*entry)()) {
#ifdef NEURON_EXT_WITH_ASAN
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);  // of frames that were left, not returned from
  fake_stack_ = nullptr;
#endif
#if defined(__x86_64__) && defined(__ELF__)
  // As if entry's first instruction had called: six registers, where to return to, and nothing
  // above.
  void** const top = reinterpret_cast<void**>(stack_ + kStackBytes) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(entry);
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::resume() {
#ifdef NEURON_EXT_WITH_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_, kStackBytes);
#endif
#if defined(__x86_64__) && defined(__ELF__)
  neuron_ext_switch_stacks(&scheduler_stack_pointer, stack_pointer_);
#else
  swapcontext(&scheduler_context, &context_);
#endif
#ifdef NEURON_EXT_WITH_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#ifdef NEURON_EXT_WITH_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void Fiber::leave([[maybe_unused]] bool for_good) {
#ifdef NEURON_EXT_WITH_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
#if defined(__x86_64__) && defined(__ELF__)
  neuron_ext_switch_stacks(&stack_pointer_, scheduler_stack_pointer);
#else
  swapcontext(&context_, &scheduler_context);
#endif
  entered();
}

void Fiber::suspend() { leave(false); }

void Fiber::finish() {
  leave(true);
  std::abort();
}

}  // namespace neuron_ext::emulator
