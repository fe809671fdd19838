// Python's door to the decoder's step. PackedDecoder keeps alive what the addresses are of.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/bind.h"
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
  py::class_<Decoder>(m, "Decoder", "A Transformer's decoder with packed weights.")
      .def(py::init(&make_decoder))
      .def(
          "step",
          [](const Decoder& decoder, const std::array<int64_t, 3>& sizes, uintptr_t x, uintptr_t out,
             const std::pair<uintptr_t, std::array<int64_t, 6>>& cache, const std::array<int64_t, 2>& ancestors,
             const std::vector<std::pair<uintptr_t, uintptr_t>>& memory, const std::array<int64_t, 5>& memory_sizes,
             const std::pair<uintptr_t, uintptr_t>& memory_rows, const std::pair<uintptr_t, uintptr_t>& places,
             uintptr_t seconds) {
            DecoderStep step;
            step.rows = sizes[0], step.beams = sizes[1], step.length = sizes[2];
            step.x = at(x), step.out = at(out);
            step.cache = at(cache.first);
            for (int i = 0; i < 5; ++i) step.cache_stride[i] = cache.second[size_t(i)];
            step.cache_rows = cache.second[5];
            step.ancestors = at(uintptr_t(ancestors[0])), step.ancestors_stride = ancestors[1];
            std::vector<std::pair<const float*, const float*>> pairs;
            for (const auto& [keys, values] : memory) pairs.emplace_back(at(keys), at(values));
            step.memory = &pairs;
            for (int i = 0; i < 3; ++i) step.memory_stride[i] = memory_sizes[size_t(i)];
            step.memory_rows = memory_sizes[3], step.S = memory_sizes[4];
            step.memory_lengths = at(memory_rows.first), step.sources = at(memory_rows.second);
            step.positions = at(places.first), step.slots = at(places.second);
            step.seconds = at(seconds);
            py::gil_scoped_release release;
            cpu::decoder_step(decoder, step);
          },
          "sizes: rows, beams, length. cache: address, five strides, rows. memory_sizes: three strides, rows, S. "
          "places: positions, slots. seconds: of products, attention and norms, three doubles that are added to, or "
          "0.");
}

}  // namespace fused
