#include "shared.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "thread.h"

namespace emu {
namespace {

constexpr size_t kAlignment = 1024;  // of dynamic shared memory: what TMA's swizzle asks for

struct Variable {
  const void* key;
  void* address;
};

struct Piece {
  char* memory;
  size_t bytes;
};

std::vector<Piece> pieces;
std::vector<Variable> variables;
char* dynamic;
size_t dynamic_size, total_size;
Clock allocated;

// `offset` bytes into new memory that ends where `bytes` do: what is beyond is ASan's to guard.
char* allocate(size_t bytes, size_t offset) {
  const size_t whole = (offset + bytes + kAlignment - 1) / kAlignment * kAlignment;
  char* memory = static_cast<char*>(std::aligned_alloc(kAlignment, whole));
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, 0xFF, whole);
  forbid(memory, offset);
  forbid(memory + offset + bytes, whole - offset - bytes);
  pieces.push_back({memory, whole});
  total_size += bytes;
  publish(allocated);
  return memory + offset;
}

void free_pieces() {
  for (const Piece& piece : pieces) {
    permit(piece.memory, piece.bytes);
    std::free(piece.memory);
  }
  pieces.clear();
}

}  // namespace

void begin_shared(size_t dynamic_bytes) {
  variables.clear();
  total_size = 0;
  dynamic_size = dynamic_bytes;
  dynamic = dynamic_bytes ? allocate(dynamic_bytes, 0) : nullptr;
}

void end_shared() {
#if !defined(EMU_TSAN)
  free_pieces();
#endif
}

// TSan must see the host free what the block touched, and orders the two only when the grid has ended.
void end_grid() { free_pieces(); }

char* dynamic_memory() {
  observe(allocated);
  if (dynamic == nullptr) fail("dynamic shared memory is used, and the launch asked for none");
  return dynamic;
}

size_t dynamic_bytes() { return dynamic_size; }

void* shared_variable(const void* key, size_t bytes, size_t alignment) {
  observe(allocated);
  for (const Variable& variable : variables)
    if (variable.key == key) return variable.address;
  char* address = nullptr;
  // The allocation is the host's doing, and all threads of the block come after it.
  Fiber::as_host([&] { address = allocate(bytes, alignment < 16 ? alignment : 0); });
  observe(allocated);
  if (total_size > kMaxSharedBytes) fail("more than 227 KiB of shared memory in all");
  variables.push_back({key, address});
  return address;
}

}  // namespace emu
