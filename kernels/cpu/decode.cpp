// The steps of decode.h; the arithmetic is that of the chosen instruction set.
#include "decode.h"

#include "scratch.h"

using namespace tinyllm;

int tinyllm_decode_project(const Block* block, const float* x, const float* cosines,
                           const float* sines, float* qkv, int64_t threads) {
  const Block& b = *block;
  const Isa& isa = isa_of(b.qkv->isa);
  thread_local Scratch scratch;
  auto* normed = static_cast<float*>(scratch.reserve(static_cast<size_t>(b.d) * sizeof(float)));
  if (normed == nullptr) return -2;
  isa.rms_norm(x, b.norm_attention, b.d, b.eps, normed);
  if (const int code = tinyllm_linear_w8a8(b.qkv, normed, 1, qkv, threads)) return code;
  for (int64_t head = 0; head < b.n_heads + b.n_kv_heads; ++head) {
    float* start = qkv + head * b.d_head;
    const float* weight = head < b.n_heads ? b.norm_q : b.norm_k;
    if (weight != nullptr) isa.rms_norm(start, weight, b.d_head, b.eps, start);
    isa.rotate(start, cosines, sines, b.d_head / 2);
  }
  return 0;
}

int tinyllm_decode_finish(const Block* block, const float* x, const float* qkv, const float* keys,
                          int64_t key_head_stride, int64_t key_stride, const float* values,
                          int64_t value_head_stride, int64_t value_stride, int64_t n_keys, float* y,
                          int64_t threads) {
  const Block& b = *block;
  const Isa& isa = isa_of(b.o->isa);
  const int64_t d_attended = b.n_heads * b.d_head, group = b.n_heads / b.n_kv_heads;
  thread_local Scratch scratch;
  const int64_t floats = d_attended + n_keys + 3 * b.d + 3 * b.d_ff;
  auto* attended = static_cast<float*>(scratch.reserve(static_cast<size_t>(floats) * sizeof(float)));
  if (attended == nullptr) return -2;
  float* scores = attended + d_attended;
  float* middle = scores + n_keys;  // x' of decode.h
  float* normed = middle + b.d;
  float* added = normed + b.d;
  float* gate_up = added + b.d;
  float* hidden = gate_up + 2 * b.d_ff;

  for (int64_t head = 0; head < b.n_heads; ++head) {
    const int64_t kv = head / group;
    isa.attend(qkv + head * b.d_head, keys + kv * key_head_stride, key_stride,
               values + kv * value_head_stride, value_stride, n_keys, b.d_head, scores,
               attended + head * b.d_head);
  }
  if (const int code = tinyllm_linear_w8a8(b.o, attended, 1, added, threads)) return code;
  for (int64_t i = 0; i < b.d; ++i) middle[i] = x[i] + added[i];
  isa.rms_norm(middle, b.norm_mlp, b.d, b.eps, normed);
  if (const int code = tinyllm_linear_w8a8(b.gate_up, normed, 1, gate_up, threads)) return code;
  isa.swiglu(gate_up, gate_up + b.d_ff, b.d_ff, hidden);
  if (const int code = tinyllm_linear_w8a8(b.down, hidden, 1, added, threads)) return code;
  for (int64_t i = 0; i < b.d; ++i) y[i] = middle[i] + added[i];
  return 0;
}
