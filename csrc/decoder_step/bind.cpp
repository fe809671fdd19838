// Python's door to the decoder's step. PackedDecoder keeps alive what the addresses are of.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "../common/bind.h"
#include "ahead.h"
#include "decoder_step.h"
#include "memory.h"

namespace py = pybind11;

namespace fused {
namespace {

using cpu::Decoder;
using cpu::DecoderLayer;
using cpu::DecoderLinear;
using cpu::DecoderNorm;
using cpu::DecoderStep;

using Affine = std::pair<uintptr_t, uintptr_t>;          // addresses of weight and bias; 0: none
using Packed = std::pair<cpu::PackedWeight, uintptr_t>;  // and the address of the bias
using Layer = std::pair<std::array<Packed, 6>, std::array<Affine, 3>>;

DecoderNorm norm(const Affine& x) { return {true, at(x.first), at(x.second)}; }
DecoderLinear layer(const Packed& x) { return {x.first, at(x.second)}; }

Decoder make_decoder(int64_t E, int64_t H, bool norm_first, float eps, int activation, const std::vector<Layer>& layers,
                     const std::optional<Affine>& final_norm) {
  FT_REQUIRE(H >= 1 && E % H == 0, "H must divide E, got " << H << " and " << E);
  Decoder decoder;
  decoder.E = E, decoder.H = H, decoder.norm_first = norm_first, decoder.eps = eps;
  decoder.activation = static_cast<Activation>(activation);
  for (const auto& [linears, norms] : layers) {
    DecoderLayer made;
    made.qkv = layer(linears[0]), made.self_out = layer(linears[1]);
    made.query = layer(linears[2]), made.memory_out = layer(linears[3]);
    made.up = layer(linears[4]), made.down = layer(linears[5]);
    const int64_t F = made.up.weight.N;
    const std::pair<const cpu::PackedWeight*, std::pair<int64_t, int64_t>> wanted[] = {
        {&made.qkv.weight, {3 * E, E}},    {&made.self_out.weight, {E, E}}, {&made.query.weight, {E, E}},
        {&made.memory_out.weight, {E, E}}, {&made.up.weight, {F, E}},       {&made.down.weight, {E, F}},
    };
    for (const auto& [weight, shape] : wanted)
      FT_REQUIRE(
          weight->N == shape.first && weight->K == shape.second,
          "a weight must be " << shape.first << " x " << shape.second << ", got " << weight->N << " x " << weight->K);
    for (int i = 0; i < 3; ++i) made.norms[i] = norm(norms[i]);
    decoder.layers.push_back(std::move(made));
  }
  if (final_norm) decoder.final_norm = norm(*final_norm);
  return decoder;
}

using Pairs = std::vector<std::pair<const float*, const float*>>;
using Cache = std::pair<uintptr_t, std::array<int64_t, 6>>;  // address; five strides, rows

// What keys and values of memory are passed as: made once, for many steps.
struct MemoryAddresses {
  Pairs pairs;
  std::array<int64_t, 5> sizes;  // three strides, rows, S
};

// A step over this cache and memory; the caller adds what it computes.
DecoderStep step_over(const Cache& cache, const MemoryAddresses& memory,
                      const std::pair<uintptr_t, uintptr_t>& memory_rows, uintptr_t seconds) {
  DecoderStep step;
  step.cache = at(cache.first);
  for (int i = 0; i < 5; ++i) step.cache_stride[i] = cache.second[size_t(i)];
  step.cache_rows = cache.second[5];
  step.memory = &memory.pairs;
  for (int i = 0; i < 3; ++i) step.memory_stride[i] = memory.sizes[size_t(i)];
  step.memory_rows = memory.sizes[3], step.S = memory.sizes[4];
  step.memory_lengths = at(memory_rows.first), step.sources = at(memory_rows.second);
  step.seconds = at(seconds);
  return step;
}

using Table = std::array<int64_t, 5>;  // address, V, address of positions, P, padding_idx

cpu::TokenTable token_table(const Table& x, float scale) {
  return {at(uintptr_t(x[0])), at(uintptr_t(x[2])), x[1], x[3], x[4], scale};
}

}  // namespace

void register_decoder_step(py::module_& m) {
  m.def(
      "place_memory",
      [](const std::array<int64_t, 5>& sizes, uintptr_t rows, uintptr_t offsets, uintptr_t out) {
        cpu::PlaceMemory args;
        args.layers = sizes[0], args.B = sizes[1], args.H = sizes[2], args.S = sizes[3], args.D = sizes[4];
        args.rows = at(rows), args.offsets = at(offsets), args.out = at(out);
        py::gil_scoped_release release;
        cpu::place_memory(args);
      },
      "sizes: layers, B, H, S, D.");
  py::class_<MemoryAddresses>(m, "MemoryAddresses", "Where a step finds keys and values of the encoder's output.")
      .def(py::init([](const std::vector<std::pair<uintptr_t, uintptr_t>>& pairs, const std::array<int64_t, 5>& sizes) {
             MemoryAddresses made;
             for (const auto& [keys, values] : pairs) made.pairs.emplace_back(at(keys), at(values));
             made.sizes = sizes;
             return made;
           }),
           "sizes: three strides, rows, S.");
  py::class_<Decoder>(m, "Decoder", "A Transformer's decoder with packed weights.")
      .def(py::init(&make_decoder))
      .def(
          "step",
          [](const Decoder& decoder, const std::array<int64_t, 3>& sizes, uintptr_t x, uintptr_t out,
             const Cache& cache, const std::array<int64_t, 2>& ancestors, const MemoryAddresses& memory,
             const std::pair<uintptr_t, uintptr_t>& memory_rows, const std::pair<uintptr_t, uintptr_t>& places,
             uintptr_t seconds, const std::optional<std::pair<Table, float>>& embedding) {
            DecoderStep step = step_over(cache, memory, memory_rows, seconds);
            step.rows = sizes[0], step.beams = sizes[1], step.length = sizes[2];
            step.out = at(out);
            if (embedding)
              step.tokens = at(x), step.embedding = token_table(embedding->first, embedding->second);
            else
              step.x = at(x);
            step.ancestors = at(uintptr_t(ancestors[0])), step.ancestors_stride = ancestors[1];
            step.positions = at(places.first), step.slots = at(places.second);
            py::gil_scoped_release release;
            return cpu::decoder_step(decoder, step);
          },
          "sizes: rows, beams, length. cache: address, five strides, rows. memory_rows: lengths, sources. places: "
          "positions, slots. seconds: of products, attention and norms, three doubles that are added to, or 0. "
          "embedding: None, or x are tokens, and this their table: address, V, address of positions, P, padding_idx, "
          "and the scale. Returns the first bad token's number, or -1.")
      .def(
          "step_ahead",
          [](const Decoder& decoder, const std::tuple<const Decoder*, const cpu::PackedWeight*, uintptr_t>& draft,
             const std::array<int64_t, 6>& sizes, const std::pair<Table, float>& embedding,
             const std::vector<int64_t>& tokens, const std::pair<uintptr_t, int64_t>& scores, const Cache& cache,
             int64_t room, const std::pair<uintptr_t, int64_t>& former, const std::vector<int64_t>& from,
             const MemoryAddresses& memory, const std::pair<uintptr_t, uintptr_t>& memory_rows, uintptr_t seconds,
             uintptr_t out, uintptr_t ancestors) {
            cpu::StepAhead args;
            args.step = step_over(cache, memory, memory_rows, seconds);
            args.B = sizes[0], args.size = sizes[1], args.levels = sizes[2], args.width = sizes[3];
            args.slots = sizes[4], args.step.length = sizes[5];
            const size_t count = size_t(args.B * args.size);
            FT_REQUIRE(args.B >= 0 && args.size >= 0 && args.width >= 0 && tokens.size() == count,
                       "there must be " << count << " tokens, got " << tokens.size());
            FT_REQUIRE(former.first == 0 || from.size() == count,
                       "there must be " << count << " histories, got " << from.size());
            args.embedding = token_table(embedding.first, embedding.second);
            const auto& [guesser, output, bias] = draft;
            const cpu::DecoderLinear projection = {*output, at(bias)};
            args.draft = guesser, args.guess = &projection;
            args.tokens = tokens.data();
            args.scores = at(scores.first), args.scores_stride = scores.second;
            args.former = at(former.first), args.former_stride = former.second, args.from = from.data();
            args.room = room, args.out = at(out), args.ancestors = at(ancestors);
            std::vector<int64_t> guesses(size_t(args.B * std::max<int64_t>(args.levels, 0) * args.width));
            args.guesses = guesses.data();
            int64_t bad;
            {
              py::gil_scoped_release release;
              bad = cpu::step_ahead(decoder, args);
            }
            return std::make_pair(bad, guesses);
          },
          "sizes: sentences, hypotheses of each, levels, width, slots, length. embedding: as for step. "
          "scores: address, stride. former: address, stride. Returns the first bad token's number, or -1, and the "
          "guesses.");
}

}  // namespace fused
