// Packs a keep mask, a byte for each query and key, into bits: word w of a query holds keys 64 w ... 64 w + 63. The
// attention kernels then read 8 bytes where they would read 64, and see at a glance whether a tile is masked whole.
//
// Axes that `keep` broadcasts are not repeated: there the bits have stride 0 too, and if it is the keys' axis a query
// has one word, all ones or all zeros. A thread packs 8 keys into a byte; bound by reading the mask once.

#include <cstring>

#include "../common/vector.cuh"
#include "device_launch.cuh"

namespace fused::cuda {
namespace {

constexpr int kThreads = 256, kEach = 8;

// grid (bytes of bits / kThreads), block (kThreads). sizes: of `keep` where it does not broadcast, else 1
__global__ void __launch_bounds__(kThreads)
    attention_keep_bits_kernel(const Attention args, const int64_t H, const int64_t L, const int64_t bytes_a_row,
                               const int64_t bytes) {
  const int64_t id = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (id >= bytes) return;
  const int64_t row = id / bytes_a_row, key = id % bytes_a_row * kEach;
  const int64_t *stride = args.keep.stride, l = row % L, h = row / L % H, b = row / L / H;
  const uint8_t* from = static_cast<const uint8_t*>(args.keep.data) + b * stride[0] + h * stride[1] + l * stride[2];
  uint32_t bits = 0;
  if (stride[3] == 0) {
    bits = from[0] != 0 ? 0xffu : 0;
  } else if (stride[3] == 1 && key + kEach <= args.S && (reinterpret_cast<uintptr_t>(from) + key) % kEach == 0) {
    const Pack<uint8_t, kEach> keep = *reinterpret_cast<const Pack<uint8_t, kEach>*>(from + key);
#pragma unroll
    for (int i = 0; i < kEach; ++i) bits |= uint32_t(keep.element[i] != 0) << i;
  } else {
    for (int i = 0; i < kEach && key + i < args.S; ++i) bits |= uint32_t(from[(key + i) * stride[3]] != 0) << i;
  }
  reinterpret_cast<uint8_t*>(args.keep_bits)[id] = uint8_t(bits);
}

}  // namespace

void pack_keep_bits(Attention& args, void* stream) {
  if (args.keep.data == nullptr) return;
  const int64_t* stride = args.keep.stride;
  const int64_t H = stride[1] ? args.H : 1, L = stride[2] ? args.L : 1, words = stride[3] ? (args.S + 63) / 64 : 1;
  const int64_t dense[4] = {H * L * words, L * words, words, 1};
  for (int axis = 0; axis < 4; ++axis) args.keep_bits_stride[axis] = stride[axis] ? dense[axis] : 0;
  const int64_t bytes_a_row = words * int64_t(sizeof(uint64_t)), bytes = (stride[0] ? args.B : 1) * H * L * bytes_a_row;
  launch(attention_keep_bits_kernel, Grid{(bytes + kThreads - 1) / kThreads}, kThreads, 0, stream, args, H, L,
         bytes_a_row, bytes);
}

}  // namespace fused::cuda
