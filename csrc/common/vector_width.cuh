#pragma once
// On the host: the choice between kernels that move 16 bytes at a time and those that move one element.

#include "vector.cuh"

namespace fused::cuda {

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// f(Count<kVec>{}): 16 bytes of T at a time if every tensor allows, else one element at a time.
template <class T, class F>
void with_vector_width(bool aligned, F&& f) {
  if (aligned)
    f(Count<kVectorBytes / int(sizeof(T))>{});
  else
    f(Count<1>{});
}

// Whether rows of `cols` elements of T are whole vectors, so that what lies dense and begins aligned stays aligned.
template <class T>
bool is_whole_vectors(int64_t cols) {
  return cols % (kVectorBytes / int64_t(sizeof(T))) == 0;
}

}  // namespace fused::cuda
