#include "wide_products.h"

#include <cmath>
#include <list>
#include <memory>
#include <vector>

#include "float_types.h"
#include "hopper.h"
#include "memory.h"
#include "shared.h"
#include "thread.h"

namespace emu {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kRows = 64, kDepth = 16, kMostColumns = 256;
constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;  // bits 62 and 63 of a descriptor
constexpr int kGroupBytes = 1024;                    // between eight rows of 128 bytes and the next eight

// A product as the whole warpgroup gave it. Registers are read and written when it is done, which may be late.
struct Issued {
  Product common;
  float* d[kWarpgroup];
  const uint32_t* a[kWarpgroup];
};

struct Warpgroup {
  Rendezvous rendezvous;
  std::list<Issued> products;
  std::vector<size_t> group_ends;  // of committed groups, counted in products
  bool fenced[kWarpgroup] = {};
  int given = 0;  // threads that gave their part of the newest product
  Agent tensor_core;
  Clock issued, done;
};

std::vector<std::unique_ptr<Warpgroup>> warpgroups;

Warpgroup& mine() { return *warpgroups[size_t(position->linear / kWarpgroup)]; }
int rank() { return position->linear % kWarpgroup; }

float value_of(uint16_t bits, WideKind kind) {
  return kind == WideKind::f16 ? __half2float({bits}) : __bfloat162float({bits});
}

// Element (row, k) of a tile in shared memory, row being an index of the result. Rows are K-major (each holds 64 values
// of k), or MN-major: each holds 64 rows, and what lies beyond them is leading_bytes further.
float element(uint64_t tile, int row, int k, bool mn_major, WideKind kind) {
  const uint32_t start = uint32_t(tile & 0x3fff) << 4, leading = uint32_t(tile >> 16 & 0x3fff) << 4,
                 stride = uint32_t(tile >> 32 & 0x3fff) << 4;
  const uint32_t offset = mn_major
                              ? row / 64 * leading + uint32_t(row % 64 * 2) + k / 8 * stride + uint32_t(k % 8 * 128)
                              : row / 8 * stride + uint32_t(row % 8 * 128 + k * 2);
  return value_of(read_half(dynamic_memory() + swizzled(start + offset)), kind);
}

// The row and column of d[i], or of a's register i (of which the second half is the next column).
int fragment_row(int thread_rank, int i) { return thread_rank / 32 * 16 + thread_rank % 32 / 4 + i % 2 * 8; }
int fragment_column(int thread_rank, int i) { return i / 2 * 8 + thread_rank % 4 * 2; }

void multiply(const Issued& product) {
  const Product& p = product.common;
  static float a[kRows][kDepth], b[kDepth][kMostColumns], c[kRows][kMostColumns];
  for (int t = 0; t < kWarpgroup && p.a; ++t)
    for (int i = 0; i < 8; ++i)
      a[fragment_row(t, i / 2)][fragment_column(t, i / 2) + i % 2] =
          value_of(uint16_t(product.a[t][i / 2] >> (16 * (i % 2))), p.kind);
  for (int row = 0; row < kRows && !p.a; ++row)
    for (int k = 0; k < kDepth; ++k) a[row][k] = element(p.a_tile, row, k, false, p.kind);
  for (int k = 0; k < kDepth; ++k)
    for (int col = 0; col < p.columns; ++col) b[k][col] = element(p.b_tile, col, k, p.b_rows_are_k, p.kind);

  for (int row = 0; row < kRows; ++row) {
    for (int col = 0; col < p.columns; ++col) c[row][col] = 0.0f;
    for (int k = 0; k < kDepth; ++k)
      for (int col = 0; col < p.columns; ++col) c[row][col] += a[row][k] * b[k][col];
  }
  for (int t = 0; t < kWarpgroup; ++t)
    for (int i = 0; i < p.columns / 2; ++i) {
      float& d = product.d[t][i];
      d = (p.accumulate ? d : 0.0f) + c[fragment_row(t, i / 2)][fragment_column(t, i / 2) + i % 2];
    }
}

void compute(Warpgroup& group, const Issued& product) {
  group.tensor_core.act([&] {
    observe(group.issued);
    multiply(product);
    publish(group.done);
  });
}

}  // namespace

void begin_products() {
  warpgroups.clear();
  for (int first = 0; first < block.threads; first += kWarpgroup) {
    warpgroups.push_back(std::make_unique<Warpgroup>());
    warpgroups.back()->rendezvous = {first, kWarpgroup};
  }
}

uint64_t describe_tile(const void* shared, int leading_bytes) {
  const uint64_t offset = uint64_t(static_cast<const char*>(shared) - dynamic_memory());
  if (offset % 16 != 0 || leading_bytes % 16 != 0) fail("wgmma: a tile that does not begin at a multiple of 16 bytes");
  return offset >> 4 | uint64_t(leading_bytes >> 4) << 16 | uint64_t(kGroupBytes >> 4) << 32 | kSwizzle128;
}

void fence_products() { mine().fenced[rank()] = true; }

void issue_product(const Product& product, const Where& where) {
  if (block.threads % kWarpgroup != 0) fail("wgmma in a block that is not made of whole warpgroups");
  Warpgroup& group = mine();
  if (!group.fenced[rank()]) fail("wgmma without wgmma.fence after its registers were last used");
  if (group.given == 0) group.products.push_back({product, {}, {}});
  group.given = (group.given + 1) % kWarpgroup;
  Issued& issued = group.products.back();
  issued.d[rank()] = product.d;
  issued.a[rank()] = product.a;
  if (block.lazy && !product.accumulate)
    for (int i = 0; i < product.columns / 2; ++i) product.d[i] = NAN;  // who reads it before the wait gets that
  publish(group.issued);
  meet(group.rendezvous, kWarpgroup, {Kind::wgmma, product.a_tile ^ product.b_tile << 1, where}, false, [&] {
    if (!block.lazy) compute(group, issued);
  });
}

void commit_products(const Where& where) {
  Warpgroup& group = mine();
  meet(group.rendezvous, kWarpgroup, {Kind::wgmma, 0, where}, false,
       [&] { group.group_ends.push_back(group.products.size()); });
}

void wait_for_products(int groups_left, const Where& where) {
  Warpgroup& group = mine();
  group.fenced[rank()] = false;
  meet(group.rendezvous, kWarpgroup, {Kind::wgmma, uint64_t(groups_left), where}, false, [&] {
    if (group.group_ends.size() <= size_t(groups_left)) return;
    const size_t groups = group.group_ends.size() - size_t(groups_left), count = group.group_ends[groups - 1];
    for (size_t i = 0; i < count; ++i) {
      if (block.lazy) compute(group, group.products.front());
      group.products.pop_front();
    }
    group.group_ends.erase(group.group_ends.begin(), group.group_ends.begin() + long(groups));
    for (size_t& end : group.group_ends) end -= count;
  });
  observe(group.done);
}

}  // namespace emu
