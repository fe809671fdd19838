#pragma once
// The forward pass once more, for Hopper alone (sm_90a; there where FT_WITH_SM90 is defined): attention.h says what is
// computed.

#include "attention.h"

namespace fused::cuda {

// nullptr if attention_forward_sm90 takes these arguments, else why not. This is the one place that says so: float16
// and bfloat16, D 64 or 128, causal, window, lengths, packed batches and grouped heads; no keep, bias or dropout, scale
// above 0, rows at multiples of 16 bytes, no axis of stride 0.
const char* why_not_sm90(const Attention& args);

// As attention_forward. q_tokens, k_tokens: of packed tensors, how many there are in all.
void attention_forward_sm90(const AttentionForward& args, int64_t q_tokens, int64_t k_tokens, void* stream);

}  // namespace fused::cuda
