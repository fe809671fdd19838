#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "sanitizers.h"

#if !defined(EMU_USES_UCONTEXT)
extern "C" void emu_switch(void** saved_stack_pointer, void* stack_pointer);

// Pushes what the ABI says a called function keeps, changes stacks, pops the same of the other.
asm(R"(
.text
.type emu_switch, @function
.hidden emu_switch
.globl emu_switch
emu_switch:
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
.size emu_switch, .-emu_switch
)");
#endif

namespace emu {
namespace {

#if defined(EMU_ASAN)
constexpr size_t kStackBytes = 256 << 10;  // redzones make frames larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kGuardBytes = 64 << 10;  // whole pages of any size; to touch them is a crash, and no silent damage

Fiber* running = nullptr;
#if defined(EMU_USES_UCONTEXT)
ucontext_t host_context;
#else
void* host_stack_pointer;
#endif
[[maybe_unused]] const void* host_stack;  // of the thread that called resume(), as ASan has it
[[maybe_unused]] size_t host_stack_bytes;
[[maybe_unused]] void* host_tsan_fiber;

}  // namespace

Fiber::Fiber(void (*body)()) : body_(body) {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<char*>(memory) + kGuardBytes;
#if defined(EMU_USES_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::begin, 0);
#else
  // As emu_switch finds it: six registers, then the address that its `ret` goes to. There the stack must be 8 bytes
  // off a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#endif
#if defined(EMU_TSAN)
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if defined(EMU_TSAN)
  __tsan_destroy_fiber(tsan_fiber_);
#endif
  permit(stack_, kStackBytes);
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::begin() {
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  running->body_();
  __builtin_trap();  // the body returned
}

void Fiber::resume() {
  running = this;
#if defined(EMU_ASAN)
  void* mine;
  __sanitizer_start_switch_fiber(&mine, stack_, kStackBytes);
#elif defined(EMU_TSAN)
  host_tsan_fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMU_USES_UCONTEXT)
  swapcontext(&host_context, &context_);
#else
  emu_switch(&host_stack_pointer, stack_pointer_);
#endif
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
  running = nullptr;
}

void Fiber::pause() {
  Fiber* self = running;
#if defined(EMU_ASAN)
  __sanitizer_start_switch_fiber(&self->asan_stack_, host_stack, host_stack_bytes);
#elif defined(EMU_TSAN)
  __tsan_switch_to_fiber(host_tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMU_USES_UCONTEXT)
  swapcontext(&self->context_, &host_context);
#else
  emu_switch(&self->stack_pointer_, host_stack_pointer);
#endif
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(self->asan_stack_, &host_stack, &host_stack_bytes);
#endif
}

void Fiber::count_as_host([[maybe_unused]] bool host) {
#if defined(EMU_TSAN)
  if (running) __tsan_switch_to_fiber(host ? host_tsan_fiber : running->tsan_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
}

Agent::Agent() {
#if defined(EMU_TSAN)
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
}

Agent::~Agent() {
#if defined(EMU_TSAN)
  __tsan_destroy_fiber(tsan_fiber_);
#endif
}

void Agent::begin() {
#if defined(EMU_TSAN)
  interrupted_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
}

void Agent::end() {
#if defined(EMU_TSAN)
  __tsan_switch_to_fiber(interrupted_, __tsan_switch_to_fiber_no_sync);
#endif
}

}  // namespace emu
