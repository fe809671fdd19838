// A row's places, and their products with a panel of 64 columns: in what parts they are added up is as in block().
//
// Floor: a place is 8 multiply-adds of vectors, 4 cycles, and 9 loads of vectors, 4.5, where block() has 5.3 loads for
// as many. A row passes a chunk of 64 of K, whose 16 KiB of weights must stay in the first-level cache: with chunks of
// 128 their lines, which lie 4 KiB apart, left it, and a place took 10 cycles. Passing takes some 90 cycles of its own:
// 16 loads and stores of sums, and the guess when the places end.

#include "sparse_rows.h"

#include "block.h"

namespace fused::cpu::FT_ISA {
#if defined(__AVX2__) && !defined(__AVX512F__)
namespace {

constexpr int kPanelVectors = int(kPanel / kWidth);

// For each set of 8 lanes which they are, one after the other.
struct Packing {
  alignas(8) uint8_t lanes[256][8];
  constexpr Packing() : lanes() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, count = 0; lane < 8; ++lane)
        if (set >> lane & 1) lanes[set][count++] = uint8_t(lane);
  }
};
constexpr Packing kPacking;

template <class T, T kValue>
struct Constant {
  static constexpr T value = kValue;
};

void find_places_of(const SparseRows& rows, int64_t row) {
  const Linear& args = *rows.product;
  const int64_t K = args.weight->K;
  const float* x = args.x + (rows.first + row) * args.x_stride;
  float* const values = rows.values + row * rows.room;
  uint16_t* const places = rows.places + row * rows.room;
  int64_t count = 0;
  for (int64_t k = 0; k < K; k += kWidth) {
    const Vec v = load(x + k, int(smaller(kWidth, K - k)));
    const int set = _mm256_movemask_ps((__m256)(v != 0.0f));
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPacking.lanes[set]));
    _mm256_storeu_ps(values + count, _mm256_permutevar8x32_ps((__m256)v, _mm256_cvtepu8_epi32(lanes)));
    const __m128i here = _mm_add_epi16(_mm_cvtepu8_epi16(lanes), _mm_set1_epi16(int16_t(k)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(places + count), here);
    count += __builtin_popcount(unsigned(set));
    const int64_t seen = k + kWidth;
    if (seen % kSparseChunk == 0 || seen >= K) rows.ends[row * rows.chunks + k / kSparseChunk] = int32_t(count);
  }
}

// What becomes of a row's sums at the end of a chunk. So many products as kSum are added up one by one, and then these
// sums, as in block().
enum class After { run_on, begin_total, add_to_total, finish };

struct Row {
  const float* value;
  const uint16_t *place, *end;  // of this chunk
  float *running, *total;
};

// The row's factors times the weights of their places, 4 blocks of columns that lie `between` floats apart. In the
// words of the processor, since GCC stores every sum in every turn.
template <bool kFresh, After kAfter>
FT_INLINE void multiply_row(const Linear& args, const Row& row, const float* weights, int64_t between, int64_t m,
                            int64_t n) {
  static_assert(kPanelVectors == 8 && kVectors == 2);
  const float *second = weights + between, *third = second + between, *fourth = third + between;
  const auto before = [&](int i) { return kFresh ? Vec{} : load(row.running + i * kWidth); };
  Vec s0 = before(0), s1 = before(1), s2 = before(2), s3 = before(3);
  Vec s4 = before(4), s5 = before(5), s6 = before(6), s7 = before(7);
  const float* value = row.value;
  for (const uint16_t* place = row.place; place != row.end; ++place, ++value) {
    const int64_t at = int64_t(*place) * int64_t(kBlock * sizeof(float));
    asm("vfmadd231ps (%[a],%[at]), %[factor], %0\n\t"
        "vfmadd231ps 32(%[a],%[at]), %[factor], %1\n\t"
        "vfmadd231ps (%[b],%[at]), %[factor], %2\n\t"
        "vfmadd231ps 32(%[b],%[at]), %[factor], %3\n\t"
        "vfmadd231ps (%[c],%[at]), %[factor], %4\n\t"
        "vfmadd231ps 32(%[c],%[at]), %[factor], %5\n\t"
        "vfmadd231ps (%[d],%[at]), %[factor], %6\n\t"
        "vfmadd231ps 32(%[d],%[at]), %[factor], %7"
        : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7)
        : [a] "r"(weights), [b] "r"(second), [c] "r"(third), [d] "r"(fourth), [at] "r"(at), [factor] "x"(splat(*value))
        : "memory");
  }
  if constexpr (kAfter == After::finish) {
    Vec sums[1][kPanelVectors] = {{s0, s1, s2, s3, s4, s5, s6, s7}};
    if (row.total != nullptr)
      for (int i = 0; i < kPanelVectors; ++i) sums[0][i] += load(row.total + i * kWidth);
    store_sums(args, m, n, sums);
  } else {
    float* const to = kAfter == After::run_on ? row.running : row.total;
    const auto keep = [&](int i, Vec s) {
      store(to + i * kWidth, kAfter == After::add_to_total ? s + load(to + i * kWidth) : s);
    };
    keep(0, s0), keep(1, s1), keep(2, s2), keep(3, s3), keep(4, s4), keep(5, s5), keep(6, s6), keep(7, s7);
  }
}

// Rows first ... first + count beside a panel; meanwhile the chunk that comes next is asked for.
void multiply_rows(const SparseRows& rows, int64_t panel, int64_t first, int64_t count) {
  alignas(64) float running[kRowsInChunks * kPanel], total[kRowsInChunks * kPanel];
  const Linear& args = *rows.product;
  const int64_t K = args.weight->K, between = K * kBlock, n = panel * kPanel;
  const float* const weights = static_cast<const float*>(args.weight->data.get()) + panel * K * kPanel;
  const float* const after = first + count < rows.count ? weights : weights + K * kPanel;
  constexpr int64_t kLines = kSparseChunk * kPanel / kLine;
  const int64_t due = (kLines + count - 1) / count;
  for (int64_t chunk = 0; chunk < rows.chunks; ++chunk) {
    const int64_t begin = chunk * kSparseChunk, stop = begin + kSparseChunk;
    const float* const ahead = stop < K ? weights + stop * kBlock : after;
    const auto rows_of_chunk = [&](auto fresh, auto then) __attribute__((always_inline)) {
      int64_t asked = 0;
      for (int64_t r = 0; r < count; ++r) {
        for (const int64_t until = smaller(asked + due, kLines); asked < until; ++asked)
          __builtin_prefetch(ahead + asked / kSparseChunk * between + asked % kSparseChunk * kLine, 0, 2);
        const int32_t* const ends = rows.ends + (first + r) * rows.chunks + chunk;
        const int64_t from = chunk > 0 ? ends[-1] : 0, list = (first + r) * rows.room;
        const uint16_t* const places = rows.places + list;
        float* const sum = total + r * kPanel;
        const Row row{rows.values + list + from, places + from, places + ends[0], running + r * kPanel,
                      decltype(then)::value == After::finish && begin < kSum ? nullptr : sum};
        multiply_row<decltype(fresh)::value, decltype(then)::value>(args, row, weights, between, rows.first + first + r,
                                                                    n);
      }
    };
    const auto as = [&](auto then) __attribute__((always_inline)) {
      begin % kSum == 0 ? rows_of_chunk(Constant<bool, true>{}, then) : rows_of_chunk(Constant<bool, false>{}, then);
    };
    if (stop >= K)
      as(Constant<After, After::finish>{});
    else if (stop % kSum != 0)
      as(Constant<After, After::run_on>{});
    else if (stop == kSum)
      as(Constant<After, After::begin_total>{});
    else
      as(Constant<After, After::add_to_total>{});
  }
}

}  // namespace

void find_places(const PlacesOfRows& some) {
  for (int64_t row = some.begin; row < some.end; ++row) find_places_of(*some.rows, row);
}

void multiply_places(const SparsePanels& some) {
  for (int64_t panel = some.begin; panel < some.end; ++panel)
    for_equal_blocks(kRowsInChunks, some.rows->count,
                     [&](int64_t first, int count) { multiply_rows(*some.rows, panel, first, count); });
}

#else  // where it was not measured

void find_places(const PlacesOfRows&) {}
void multiply_places(const SparsePanels&) {}

#endif
}  // namespace fused::cpu::FT_ISA
