#include "ahead.h"

#include <algorithm>
#include <cstring>

#include "../common/scratch.h"
#include "../log_softmax_top_k/log_softmax_top_k.h"

namespace fused::cpu {
namespace {

class Ahead;
using Room = Scratch<Ahead>;

class Ahead {
 public:
  Ahead(const Decoder& decoder, const StepAhead& args)
      : d_(decoder),
        a_(args),
        E_(decoder.E),
        V_(args.embedding.V),
        each_(args.size + args.levels * args.width),
        most_(args.B * std::max(args.size, args.levels > 0 ? args.width : 0)),
        memory_(bytes()) {
    x_ = memory_.take<float>(most_ * E_);
    hidden_ = memory_.take<float>(most_ * E_);
    all_ = memory_.take<float>(rows() * E_);
    positions_ = memory_.take<int64_t>(rows());
    slots_ = memory_.take<int64_t>(rows());
    tokens_ = memory_.take<int64_t>(most_);
    for (int i = 0; i < 2; ++i) histories_[i] = memory_.take<int32_t>(most_ * a_.room);
    if (a_.levels == 0) return;
    logits_ = memory_.take<float>(most_ * V_);
    scores_ = memory_.take<float>(most_);
    places_ = memory_.take<int64_t>(most_);
    values_ = memory_.take<float>(most_);
    kept_ = memory_.take<int32_t>(most_ * 2 * a_.width);
    sums_ = memory_.take<float>(most_ * 2);
    rounded_ = memory_.take<char>(linear_scratch(a_.guess->weight, most_));
  }

  int64_t run() {
    begin();
    for (int64_t level = 0;; ++level) {
      const int64_t bad = embed(level);
      if (bad >= 0) return bad;  // of level 0 alone: guesses are tokens of the vocabulary
      put(level);
      if (level == a_.levels) break;
      guess(level);
    }
    for (int64_t b = 0; b < a_.B; ++b)
      for (int64_t level = 0; level <= a_.levels; ++level) place(level, b, b * each_ + offset(level));
    DecoderStep step = a_.step;
    step.length = a_.step.length + a_.levels;
    step.rows = rows(), step.beams = each_;
    step.x = all_, step.out = a_.out;
    step.ancestors = a_.ancestors, step.ancestors_stride = a_.room;
    step.positions = positions_, step.slots = slots_;
    decoder_step(d_, step);
    return -1;
  }

 private:
  int64_t rows() const { return a_.B * each_; }
  int64_t size(int64_t level) const { return level == 0 ? a_.size : a_.width; }
  int64_t offset(int64_t level) const { return level == 0 ? 0 : a_.size + (level - 1) * a_.width; }
  int64_t slot(int64_t b, int64_t i) const { return b * a_.slots + i; }

  // positions_ and slots_ of a level's rows of one sentence, from `at` on.
  void place(int64_t level, int64_t b, int64_t at) {
    for (int64_t i = 0; i < size(level); ++i) {
      positions_[at + i] = a_.step.length + level;
      slots_[at + i] = slot(b, i);
    }
  }

  void begin() {
    const int64_t count = a_.B * a_.size;
    std::memcpy(tokens_, a_.tokens, size_t(count) * sizeof(int64_t));
    int32_t* const table = histories_[0];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t known = a_.former == nullptr ? 0 : a_.step.length;
      if (known > 0)
        std::memcpy(table + r * a_.room, a_.former + a_.from[r] * a_.former_stride, size_t(known) * sizeof(int32_t));
      std::fill(table + r * a_.room + known, table + (r + 1) * a_.room, 0);
    }
    if (a_.levels == 0) return;
    for (int64_t r = 0; r < count; ++r) {  // guessing only compares those of a sentence, and float32 has few digits
      const double* const own = a_.scores == nullptr ? nullptr : a_.scores + r / a_.size * a_.scores_stride;
      scores_[r] = own == nullptr ? 0.0f : float(own[r % a_.size] - own[0]);
    }
  }

  // x_ = the embedded tokens of a level; from now on its rows read what they write.
  int64_t embed(int64_t level) {
    const int64_t count = a_.B * size(level), position = a_.step.length + level;
    const int64_t bad = embed_tokens(a_.embedding, E_, tokens_, count, position, nullptr, x_);
    for (int64_t b = 0; b < a_.B; ++b)
      for (int64_t i = 0; i < size(level); ++i)
        histories_[level % 2][(b * size(level) + i) * a_.room + position] = int32_t(slot(b, i));
    return bad;
  }

  // A level's rows among all of them.
  void put(int64_t level) {
    const int64_t count = size(level);
    for (int64_t b = 0; b < a_.B; ++b) {
      const int64_t to = b * each_ + offset(level), from = b * count;
      std::memcpy(all_ + to * E_, x_ + from * E_, size_t(count * E_) * sizeof(float));
      std::memcpy(a_.ancestors + to * a_.room, histories_[level % 2] + from * a_.room,
                  size_t(count * a_.room) * sizeof(int32_t));
    }
  }

  // Tokens, scores and histories of the level after this one, from x_.
  void guess(int64_t level) {
    const int64_t count = size(level);
    for (int64_t b = 0; b < a_.B; ++b) place(level, b, b * count);
    DecoderStep step = a_.step;
    step.length = a_.step.length + level;
    step.rows = a_.B * count, step.beams = count;
    step.x = x_, step.out = hidden_;
    step.ancestors = histories_[level % 2], step.ancestors_stride = a_.room;
    step.positions = positions_, step.slots = slots_;
    decoder_step(*a_.draft, step);

    Linear product;
    product.weight = &a_.guess->weight, product.bias = a_.guess->bias;
    product.M = step.rows;
    product.x = hidden_, product.x_stride = E_;
    product.y = logits_, product.y_stride = V_;
    product.scratch = rounded_;
    linear(product);

    LogSoftmaxTopK best{};
    best.M = step.rows, best.V = V_, best.beams = count, best.k = a_.width;
    best.dtype = DType::f32;
    best.x = logits_, best.x_stride = V_;
    best.addend = scores_;
    best.values = values_, best.places = places_;
    best.kept = kept_, best.sums = sums_;
    log_softmax_top_k(best);

    const int32_t* const before = histories_[level % 2];
    int32_t* const after = histories_[(level + 1) % 2];
    for (int64_t b = 0; b < a_.B; ++b)
      for (int64_t i = 0; i < a_.width; ++i) {
        const int64_t r = b * a_.width + i, extended = places_[r] / V_;
        a_.guesses[(b * a_.levels + level) * a_.width + i] = places_[r];
        tokens_[r] = places_[r] - extended * V_;
        std::memcpy(after + r * a_.room, before + (b * count + extended) * a_.room, size_t(a_.room) * sizeof(int32_t));
      }
    std::swap(scores_, values_);
  }

  size_t bytes() const {
    const int64_t most = most_;
    size_t total = 2 * Room::room(most * E_ * 4) + Room::room(rows() * E_ * 4) + 2 * Room::room(rows() * 8) +
                   Room::room(most * 8) + 2 * Room::room(most * a_.room * 4);
    if (a_.levels == 0) return total;
    total += Room::room(most * V_ * 4) + 2 * Room::room(most * 4) + Room::room(most * 8);
    total += Room::room(most * 2 * a_.width * 4) + Room::room(most * 2 * 4);
    return total + Room::room(linear_scratch(a_.guess->weight, most));
  }

  const Decoder& d_;
  const StepAhead& a_;
  const int64_t E_, V_;
  const int64_t each_, most_;  // rows of a sentence in all levels, and of all sentences in one
  Room memory_;
  float *x_, *hidden_, *all_;
  float *logits_ = nullptr, *scores_ = nullptr, *values_ = nullptr, *sums_ = nullptr;
  int64_t *positions_, *slots_, *tokens_, *places_ = nullptr;
  int32_t *histories_[2], *kept_ = nullptr;
  char* rounded_ = nullptr;
};

}  // namespace

int64_t step_ahead(const Decoder& decoder, const StepAhead& args) {
  const int64_t most = std::max(args.size, args.levels > 0 ? args.width : 0);
  FT_REQUIRE(args.B >= 1 && args.size >= 1 && args.levels >= 0 && (args.levels == 0 || args.width >= 1),
             "there must be a hypothesis, and guesses where there are levels of them");
  FT_REQUIRE(args.step.length >= 0 && args.step.length + args.levels < args.room,
             "the cache has room for " << args.room << " positions, and " << args.step.length << " + " << args.levels
                                       << " + 1 are wanted");
  FT_REQUIRE(args.slots >= most && args.B * args.slots <= args.step.cache_rows,
             "the cache has " << args.step.cache_rows << " rows, for " << args.B << " sentences of " << most);
  FT_REQUIRE(args.embedding.positions == nullptr || args.step.length + args.levels < args.embedding.P,
             "there are positions up to " << args.embedding.P);
  FT_REQUIRE(args.levels == 0 || (args.guess->weight.N == args.embedding.V && args.guess->weight.K == decoder.E),
             "a draft's projection must be of the table's shape");
  FT_REQUIRE(args.levels == 0 || (args.draft->E == decoder.E && args.draft->H == decoder.H &&
                                  args.draft->layers.size() == decoder.layers.size()),
             "a draft must have the decoder's width, heads and layers");
  return Ahead(decoder, args).run();
}

}  // namespace fused::cpu
