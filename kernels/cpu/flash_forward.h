// Attention forward, for one instruction set; included by each. Everything is static: see w8a8.h.
//
// A tile of 6 queries meets up to 512 keys at a time: their scores fill 12 KB, so they stay in the
// first cache, and maxima, sums and outputs are corrected once per 512 keys instead of once per 64.
#pragma once
#include "flash_pack.h"

namespace tinyllm {
namespace {

constexpr int64_t kChunkKeys = 512;

template <class S>
struct Forward {
  using Vec = typename S::Vec;

  const Attention& p;
  int64_t n_rows, n_keys;  // padded to whole tiles and blocks
  uint32_t *rows, *keys, *values, *queries, *weights;
  float *scores, *out;
  Visible visible;
  int64_t used;

  Forward(const Attention& problem, Arena arena)
      : p(problem),
        n_rows(round_up(p.n_tokens, kRows)),
        n_keys(round_up(p.n_tokens, kBlockKeys)),
        rows(arena.take<uint32_t>(n_keys * at_least(p.width, p.value_width) / S::kGroup)),
        keys(arena.take<uint32_t>(n_keys * p.width / S::kGroup)),
        values(arena.take<uint32_t>(n_keys * p.value_width / S::kGroup)),
        queries(arena.take<uint32_t>(n_rows * p.width / S::kGroup)),
        weights(arena.take<uint32_t>(kRows * kChunkKeys / S::kGroup)),
        scores(arena.take<float>(kRows * kChunkKeys)),
        out(arena.take<float>(kRows * p.value_width)),
        visible(p, arena),
        used(arena.used) {}

  template <class In>
  void run(int64_t task) {
    const int64_t batch = task / p.n_kv_heads, group = task % p.n_kv_heads;
    if (p.documents != nullptr) visible.fill(p.documents + batch * p.n_tokens);
    const In* k = head_of<In>(p.k, batch, group);
    pack_rows<S>(k, p.k.token, p.n_tokens, n_keys, p.width, rows);
    pack_panels<S>(rows, n_keys, p.width / S::kGroup, keys);
    const In* v = head_of<In>(p.v, batch, group);
    if constexpr (S::kGroup == 2) {
      pack_rows<S>(v, p.v.token, p.n_tokens, n_keys, p.value_width, rows);
      pack_pairs<S>(rows, n_keys, p.value_width, values);
    } else {
      pack_rows<S>(v, p.v.token, p.n_tokens, n_keys, p.value_width, values);
    }
    const int64_t shared = p.n_heads / p.n_kv_heads;
    for (int64_t head = group * shared; head < (group + 1) * shared; ++head) {
      const In* q = head_of<In>(p.q, batch, head);
      pack_rows<S>(q, p.q.token, p.n_tokens, n_rows, p.width, queries);
      In* o = head_of<In>(p.o, batch, head);
      float* lse = p.lse + (batch * p.n_heads + head) * p.n_tokens;
      for (int64_t row = 0; row < p.n_tokens; row += kRows) {
        float sum[kRows];
        tile(row, sum, lse);
        for (int64_t r = 0; r < at_most(kRows, p.n_tokens - row); ++r)
          write_row(out + r * p.value_width, p.value_width, 1.0f / sum[r],
                    o + (row + r) * p.o.token);
      }
    }
  }

  // Of the queries [row, row + kRows): `out` before division by `sum`, and the log-sum-exps.
  void tile(int64_t row, float* sum, float* lse) {
    float most[kRows], factor[kRows];
    for (int64_t r = 0; r < kRows; ++r) most[r] = -1e30f, sum[r] = 0;
    __builtin_memset(out, 0, static_cast<size_t>(kRows * p.value_width) * sizeof *out);
    const int64_t end = at_most(p.n_tokens, row + kRows);
    for (int64_t key = visible.first_key(row); key < end; key += kChunkKeys) {
      const int64_t n = at_most(kChunkKeys, end - key);
      Vec largest[kRows];
      for (int64_t r = 0; r < kRows; ++r) largest[r] = Vec{} - 1e30f;
      int64_t done = 0;
      while (done < n) done += panel(row, key + done, n - done, scores + done, largest);
      for (int64_t r = 0; r < kRows; ++r)
        soften(scores + r * kChunkKeys, done, largest_lane<S>(largest[r]),
               weights + r * kChunkKeys / S::kGroup, most + r, sum + r, factor + r);
      accumulate<S, kRows>(out, p.value_width, p.value_width, factor, weights,
                           kChunkKeys / S::kGroup, 1, values + key / S::kGroup * p.value_width,
                           (n + S::kGroup - 1) / S::kGroup);
    }
    for (int64_t r = 0; r < at_most(kRows, p.n_tokens - row); ++r)
      lse[row + r] = most[r] * p.scale + __builtin_logf(sum[r]);
  }

  // Scores, before scaling, with up to one panel of keys, and their maxima. Returns how many.
  int64_t panel(int64_t row, int64_t key, int64_t n, float* to, Vec* largest) {
    const int64_t vectors = at_most(S::kVectors, (n + S::kLanes - 1) / S::kLanes);
    const auto run = [&](auto count) {
      constexpr int V = count.value;
      const int64_t step = p.width / S::kGroup;
      Vec sums[kRows][V] = {};
      multiply<S, kRows, V>(sums, queries + row * step, step, 1, keys + key * step, kPanel<S>,
                            step);
      if (!visible.all(row, key, V * S::kLanes))
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            sums[r][v] = visible.template mask<S>(row + r, key + v * S::kLanes)
                             ? sums[r][v]
                             : Vec{} - __builtin_inff();
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          store<S>(to + r * kChunkKeys + v * S::kLanes, sums[r][v]);
          largest[r] = larger<S>(largest[r], sums[r][v]);
        }
    };
    with_count<S>(vectors, run);
    return vectors * S::kLanes;
  }

  // One row's scores to weights exp(scale (score - maximum)); what was summed before is corrected.
  void soften(const float* score, int64_t n, float largest, uint32_t* to, float* most, float* sum,
              float* factor) {
    const float now = largest > *most ? largest : *most;
    const float unit = p.scale * kLog2E;
    *factor = exp2_lanes<S>(Vec{} + (*most - now) * unit)[0];
    Vec total = {};
    for (int64_t j = 0; j < n; j += S::kLanes) {
      const Vec weight = exp2_lanes<S>(load<S>(score + j) * unit - now * unit);
      total += weight;
      S::store_row(to + j / S::kGroup, weight);
    }
    *sum = *sum * *factor + sum_lanes<S>(total);
    *most = now;
  }
};

}  // namespace
}  // namespace tinyllm
