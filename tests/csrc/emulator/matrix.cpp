#include "matrix.h"

#include "float_types.h"
#include "memory.h"
#include "warp_slots.h"

namespace emu {
namespace {

constexpr uint32_t kWholeWarp = ~0u;

struct Rows {
  const void* address[4][2];  // of each matrix: the rows that this lane's two elements come from
};

template <int kCount>
void deal_rows(const Slots& slots, bool transposed) {
  const void* given[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) given[lane] = slots.get<const void*>(lane);
  for (int lane = 0; lane < kLanes; ++lane) {
    Rows rows{};
    for (int m = 0; m < kCount; ++m)
      for (int e = 0; e < 2; ++e) rows.address[m][e] = given[m * 8 + (transposed ? lane % 4 * 2 + e : lane / 4)];
    slots.put(lane, rows);
  }
}

struct Fragments {
  uint32_t a[4], b[2];
  float d[4];
};

struct Accumulators {
  float d[4];
};

float half_of(uint32_t pair, int which, HalfKind kind) {
  const uint16_t bits = uint16_t(pair >> (16 * which));
  return kind == HalfKind::f16 ? __half2float({bits}) : __bfloat162float({bits});
}

float tf32(uint32_t bits) {
  bits &= ~0x1fffu;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// d += a b for the whole warp, kDepth being the inner dimension; unpack(fragments, lane, a, b) writes what a lane
// holds.
template <int kDepth, class Unpack>
void multiply(const Slots& slots, const Unpack& unpack) {
  float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Fragments held = slots.get<Fragments>(lane);
    unpack(held, lane, a, b);
    for (int i = 0; i < 4; ++i) d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = held.d[i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kDepth; ++k)
      for (int col = 0; col < 8; ++col) d[row][col] += a[row][k] * b[k][col];
  for (int lane = 0; lane < kLanes; ++lane) {
    Accumulators out;
    for (int i = 0; i < 4; ++i) out.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    slots.put(lane, out);
  }
}

template <class F>
void exchange_fragments(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Where& where,
                        const F& multiply_all) {
  const Fragments given{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  const Accumulators taken = exchange<Accumulators>(kWholeWarp, Kind::mma, given, where, multiply_all);
  std::memcpy(d, taken.d, sizeof taken.d);
}

}  // namespace

template <int kCount>
void ldmatrix(uint32_t (&out)[kCount], const void* row, bool transposed, const Where& where) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix from a row that does not begin at a multiple of 16");
  const Rows rows = exchange<Rows>(kWholeWarp, Kind::ldmatrix, row, where,
                                   [&](const Slots& slots) { deal_rows<kCount>(slots, transposed); });
  const int lane = position->lane;
  for (int m = 0; m < kCount; ++m) {
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e) {
      const auto* elements = static_cast<const uint16_t*>(rows.address[m][e]);
      pair |= uint32_t(read_half(elements + (transposed ? lane / 4 : lane % 4 * 2 + e))) << (16 * e);
    }
    out[m] = pair;
  }
}

template void ldmatrix<1>(uint32_t (&)[1], const void*, bool, const Where&);
template void ldmatrix<2>(uint32_t (&)[2], const void*, bool, const Where&);
template void ldmatrix<4>(uint32_t (&)[4], const void*, bool, const Where&);

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, HalfKind kind, const Where& where) {
  exchange_fragments(d, a, b0, b1, where, [kind](const Slots& slots) {
    multiply<16>(slots, [kind](const Fragments& held, int lane, float (&a)[16][16], float (&b)[16][8]) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][pair + i / 2 * 8 + e] = half_of(held.a[i], e, kind);
        for (int i = 0; i < 2; ++i) b[pair + i * 8 + e][group] = half_of(held.b[i], e, kind);
      }
    });
  });
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Where& where) {
  exchange_fragments(d, a, b0, b1, where, [](const Slots& slots) {
    multiply<8>(slots, [](const Fragments& held, int lane, float (&a)[16][8], float (&b)[8][8]) {
      const int group = lane / 4, col = lane % 4;
      for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][col + i / 2 * 4] = tf32(held.a[i]);
      for (int i = 0; i < 2; ++i) b[col + i * 4][group] = tf32(held.b[i]);
    });
  });
}

}  // namespace emu
