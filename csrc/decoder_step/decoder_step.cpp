#include "decoder_step.h"

#include <chrono>
#include <cmath>
#include <cstring>

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../decode_attention/decode_attention.h"
#include "../layer_norm/layer_norm.h"

namespace fused::cpu {
namespace {

// Adds the time of its block to seconds[part], if there are any.
class Timed {
 public:
  Timed(double* seconds, Part part) : seconds_(seconds == nullptr ? nullptr : seconds + part) {
    if (seconds_ != nullptr) start_ = Clock::now();
  }
  ~Timed() {
    if (seconds_ != nullptr) *seconds_ += std::chrono::duration<double>(Clock::now() - start_).count();
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  double* seconds_;
  Clock::time_point start_;
};

class Step;
using Room = Scratch<Step>;

class Step {
 public:
  Step(const Decoder& decoder, const DecoderStep& step)
      : d_(decoder), s_(step), R_(step.rows), E_(decoder.E), D_(decoder.E / decoder.H), memory_(bytes()) {
    a_ = memory_.take<float>(R_ * E_);
    b_ = memory_.take<float>(R_ * E_);
    normed_ = memory_.take<float>(R_ * E_);
    wide_ = memory_.take<float>(R_ * widest());
    partial_ = memory_.take<float>(partial_floats());
    rounded_ = memory_.take<char>(linear_bytes());
    if (s_.positions == nullptr) return;
    histories_ = memory_.take<int64_t>(R_);
    for (int64_t r = 0; r < R_; ++r) histories_[r] = s_.positions[r] + 1;
  }

  int64_t run() {
    const float* x = s_.x;  // the stream: a_ and b_ in turns
    if (x == nullptr) {
      const int64_t bad = embed_tokens(s_.embedding, E_, s_.tokens, R_, s_.length, s_.positions, b_);
      if (bad >= 0) return bad;
      x = b_;
    }
    for (size_t index = 0; index < d_.layers.size(); ++index) {
      const DecoderLayer& layer = d_.layers[index];
      x = sublayer(x, layer.norms[0], layer.self_out, [&](const float* in) { return attend(layer, index, in); });
      x = sublayer(x, layer.norms[1], layer.memory_out, [&](const float* in) { return look(layer, index, in); });
      x = sublayer(x, layer.norms[2], layer.down, [&](const float* in) {
        apply(layer.up, in, wide_, nullptr, d_.activation);
        return static_cast<const float*>(wide_);
      });
    }
    if (d_.final_norm.present)
      normalise(d_.final_norm, x, s_.out);
    else
      std::memcpy(s_.out, x, size_t(R_ * E_) * sizeof(float));
    return -1;
  }

 private:
  // The stream after a sublayer that ends with the projection `last` of what `inner` returns.
  template <class F>
  const float* sublayer(const float* x, const DecoderNorm& norm, const DecoderLinear& last, const F& inner) {
    float* const out = x == a_ ? b_ : a_;
    if (d_.norm_first) {
      normalise(norm, x, normed_);
      apply(last, inner(normed_), out, x, Activation::none);
    } else {
      apply(last, inner(x), normed_, x, Activation::none);
      normalise(norm, normed_, out);
    }
    return out;
  }

  const float* attend(const DecoderLayer& layer, size_t index, const float* x) {
    apply(layer.qkv, x, wide_, nullptr, Activation::none);
    const Timed timed(s_.seconds, kAttention);
    float* const keys = s_.cache + int64_t(index) * s_.cache_stride[0];
    float* const values = keys + s_.cache_stride[1];
    parallel_for(R_, 2 * R_ * E_, [&](int64_t r) {
      const float* const qkv = wide_ + r * 3 * E_;
      for (int64_t h = 0; h < d_.H; ++h) {
        const int64_t to = slot(r) * s_.cache_stride[2] + h * s_.cache_stride[3] + position(r) * s_.cache_stride[4];
        std::memcpy(keys + to, qkv + E_ + h * D_, size_t(D_) * sizeof(float));
        std::memcpy(values + to, qkv + 2 * E_ + h * D_, size_t(D_) * sizeof(float));
      }
    });
    DecodeAttention args = attention(R_, 1, s_.cache_rows, s_.length + 1);
    args.q = {wide_, {3 * E_, D_, 0}};
    args.k = {keys, {s_.cache_stride[2], s_.cache_stride[3], s_.cache_stride[4]}};
    args.v = {values, {s_.cache_stride[2], s_.cache_stride[3], s_.cache_stride[4]}};
    float* const heads = wide_ + 3 * R_ * E_;
    args.out = {heads, {E_, D_, 0}};
    args.lengths = {histories_, true};
    if (s_.ancestors != nullptr) {
      args.rows = {s_.ancestors, false};
      args.rows_batch = s_.ancestors_stride, args.rows_position = 1;
    } else {
      args.rows = {own_rows(), true};
      args.rows_batch = 1, args.rows_position = 0;
    }
    decode_attention(args);
    return heads;
  }

  const float* look(const DecoderLayer& layer, size_t index, const float* x) {
    apply(layer.query, x, wide_, nullptr, Activation::none);
    const Timed timed(s_.seconds, kAttention);
    const int64_t sequences = R_ / s_.beams;
    DecodeAttention args = attention(sequences, s_.beams, s_.memory_rows, s_.S);
    const auto [keys, values] = (*s_.memory)[index];
    args.q = {wide_, {s_.beams * E_, D_, E_}};
    args.k = {const_cast<float*>(keys), {s_.memory_stride[0], s_.memory_stride[1], s_.memory_stride[2]}};
    args.v = {const_cast<float*>(values), {s_.memory_stride[0], s_.memory_stride[1], s_.memory_stride[2]}};
    float* const heads = wide_ + 3 * R_ * E_;
    args.out = {heads, {s_.beams * E_, D_, E_}};
    args.lengths = {s_.memory_lengths, false};
    args.rows = {s_.sources != nullptr ? s_.sources : own_rows(), true};
    args.rows_batch = 1, args.rows_position = 0;
    args.causal = false;
    decode_attention(args);
    return heads;
  }

  DecodeAttention attention(int64_t B, int64_t L, int64_t R, int64_t C) {
    DecodeAttention args;
    args.B = B, args.H = d_.H, args.Hk = d_.H, args.L = L, args.D = D_, args.R = R, args.C = C;
    args.dtype = DType::f32;
    args.scale = 1.0f / std::sqrt(float(D_));
    args.partial = partial_;
    return args;
  }

  void apply(const DecoderLinear& layer, const float* x, float* y, const float* residual, Activation activation) {
    const Timed timed(s_.seconds, kProducts);
    Linear args;
    args.weight = &layer.weight;
    args.M = R_;
    args.x = x, args.x_stride = layer.weight.K;
    args.bias = layer.bias;
    args.residual = residual, args.residual_stride = layer.weight.N;
    args.y = y, args.y_stride = layer.weight.N;
    args.activation = activation;
    args.scratch = rounded_;
    linear(args);
  }

  void normalise(const DecoderNorm& norm, const float* x, float* y) {
    const Timed timed(s_.seconds, kNorms);
    LayerNormForward args{};
    args.x = x, args.x_stride = E_;
    args.weight = norm.weight, args.bias = norm.bias;
    args.y = y;
    args.M = R_, args.N = E_;
    args.eps = d_.eps;
    args.dropout_scale = 1.0f;
    args.dtype = args.param_dtype = DType::f32;
    layer_norm_forward(args);
  }

  int64_t position(int64_t row) const { return s_.positions != nullptr ? s_.positions[row] : s_.length; }
  int64_t slot(int64_t row) const { return s_.slots != nullptr ? s_.slots[row] : row; }

  const int64_t* own_rows() {  // 0, 1, 2 ...: which row a row reads where nobody has moved
    static thread_local std::vector<int64_t> numbers;
    while (int64_t(numbers.size()) < R_) numbers.push_back(int64_t(numbers.size()));
    return numbers.data();
  }

  int64_t widest() const {  // of `wide_`: q, k, v and the heads, or the feed-forward's inside
    int64_t width = 4 * E_;
    for (const DecoderLayer& layer : d_.layers) width = layer.up.weight.N > width ? layer.up.weight.N : width;
    return width;
  }
  int64_t partial_floats() const {
    const int64_t self = decode_attention_partial(R_, d_.H, 1, s_.length + 1, D_);
    const int64_t memory = decode_attention_partial(R_ / s_.beams, d_.H, s_.beams, s_.S, D_);
    return self > memory ? self : memory;
  }
  int64_t linear_bytes() const {
    int64_t most = 0;
    for (const DecoderLayer& layer : d_.layers)
      for (const DecoderLinear* x :
           {&layer.qkv, &layer.self_out, &layer.query, &layer.memory_out, &layer.up, &layer.down}) {
        const int64_t bytes = linear_scratch(x->weight, R_);
        most = bytes > most ? bytes : most;
      }
    return most;
  }
  size_t bytes() const {
    return 3 * Room::room(R_ * E_ * 4) + Room::room(R_ * widest() * 4) + Room::room(partial_floats() * 4) +
           Room::room(linear_bytes()) + (s_.positions != nullptr ? Room::room(R_ * 8) : 0);
  }

  const Decoder& d_;
  const DecoderStep& s_;
  const int64_t R_, E_, D_;
  Room memory_;
  float *a_, *b_, *normed_, *wide_, *partial_;
  char* rounded_;
  int64_t* histories_ = nullptr;  // positions that each row reads, the new one counted; nullptr: all there are
};

}  // namespace

int64_t decoder_step(const Decoder& decoder, const DecoderStep& step) {
  if (step.rows == 0) return -1;
  FT_REQUIRE(step.beams >= 1 && step.rows % step.beams == 0,
             "rows must be a multiple of beams, got " << step.rows << " and " << step.beams);
  FT_REQUIRE(step.memory != nullptr && step.memory->size() == decoder.layers.size(),
             "each layer needs the keys and values of memory");
  const auto within = [](int64_t x, int64_t end) { return 0 <= x && x < end; };
  FT_REQUIRE((step.positions == nullptr) == (step.slots == nullptr), "positions and slots are given together");
  for (int64_t r = 0; step.positions != nullptr && r < step.rows; ++r) {
    FT_REQUIRE(within(step.positions[r], step.length + 1),
               "positions must be between 0 and " << step.length << ", got " << step.positions[r]);
    FT_REQUIRE(within(step.slots[r], step.cache_rows),
               "slots must be between 0 and " << step.cache_rows - 1 << ", got " << step.slots[r]);
  }
  FT_REQUIRE(step.x != nullptr || step.embedding.positions == nullptr || step.length < step.embedding.P,
             "there are " << step.embedding.P << " positions, and " << step.length << " + 1 are wanted");
  return Step(decoder, step).run();
}

}  // namespace fused::cpu
