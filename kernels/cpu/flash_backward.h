// Attention backward, for one instruction set; included by each. Everything is static: see w8a8.h.
//
//   P = exp(S - lse)    dV = P^T dO    dS = P (dO V^T - rowsum(dO O))    dQ = scale dS K    dK = scale dS^T Q
//
// (Dao 2023, arXiv:2307.08691, algorithm 2.) Blocks of 64 keys are outside, so that a block of dK and
// dV stays in the cache; 96 queries are inside; dQ collects in fp32. One thread does one key-value
// head, so every sum has one order.
#pragma once
#include "flash_pack.h"

namespace tinyllm {
namespace {

constexpr int64_t kBlockRows = 96;

template <class S>
struct Backward {
  using Vec = typename S::Vec;
  static constexpr bool kPairs = S::kGroup == 2;

  const Attention& p;
  int64_t n_rows, n_keys;
  uint32_t *k_rows, *k_panels, *k_pairs, *v_rows, *v_panels;
  uint32_t *q_rows, *q_pairs, *do_rows, *do_pairs;
  float *lse, *delta, *d_q, *d_k, *d_v;
  uint32_t *weight_pairs, *slope_pairs, *slope_rows;  // P and dS of one block
  Visible visible;
  int64_t used;

  Backward(const Attention& problem, Arena arena)
      : p(problem),
        n_rows(round_up(p.n_tokens, kRows)),
        n_keys(round_up(p.n_tokens, kBlockKeys)),
        k_rows(arena.take<uint32_t>(n_keys * p.width / S::kGroup)),
        k_panels(arena.take<uint32_t>(n_keys * p.width / S::kGroup)),
        k_pairs(kPairs ? arena.take<uint32_t>(n_keys * p.width / S::kGroup) : k_rows),
        v_rows(arena.take<uint32_t>(n_keys * p.value_width / S::kGroup)),
        v_panels(arena.take<uint32_t>(n_keys * p.value_width / S::kGroup)),
        q_rows(arena.take<uint32_t>(n_rows * p.width / S::kGroup)),
        q_pairs(kPairs ? arena.take<uint32_t>(n_rows * p.width / S::kGroup) : q_rows),
        do_rows(arena.take<uint32_t>(n_rows * p.value_width / S::kGroup)),
        do_pairs(kPairs ? arena.take<uint32_t>(n_rows * p.value_width / S::kGroup) : do_rows),
        lse(arena.take<float>(n_rows)),
        delta(arena.take<float>(n_rows)),
        d_q(arena.take<float>(n_rows * p.width)),
        d_k(arena.take<float>(n_keys * p.width)),
        d_v(arena.take<float>(n_keys * p.value_width)),
        weight_pairs(arena.take<uint32_t>(kBlockRows / S::kGroup * kBlockKeys)),
        slope_pairs(arena.take<uint32_t>(kBlockRows / S::kGroup * kBlockKeys)),
        slope_rows(kPairs ? arena.take<uint32_t>(kBlockRows * kBlockKeys / S::kGroup) : slope_pairs),
        visible(p, arena),
        used(arena.used) {}

  template <class In>
  void run(int64_t task) {
    const int64_t batch = task / p.n_kv_heads, group = task % p.n_kv_heads;
    if (p.documents != nullptr) visible.fill(p.documents + batch * p.n_tokens);
    const In* k = head_of<In>(p.k, batch, group);
    const In* v = head_of<In>(p.v, batch, group);
    pack_rows<S>(k, p.k.token, p.n_tokens, n_keys, p.width, k_rows);
    pack_rows<S>(v, p.v.token, p.n_tokens, n_keys, p.value_width, v_rows);
    pack_panels<S>(k_rows, n_keys, p.width / S::kGroup, k_panels);
    pack_panels<S>(v_rows, n_keys, p.value_width / S::kGroup, v_panels);
    if constexpr (kPairs) pack_pairs<S>(k_rows, n_keys, p.width, k_pairs);
    __builtin_memset(d_k, 0, static_cast<size_t>(n_keys * p.width) * sizeof *d_k);
    __builtin_memset(d_v, 0, static_cast<size_t>(n_keys * p.value_width) * sizeof *d_v);
    const int64_t shared = p.n_heads / p.n_kv_heads;
    for (int64_t head = group * shared; head < (group + 1) * shared; ++head) one_head<In>(batch, head);
    In* to_k = head_of<In>(p.d_k, batch, group);
    In* to_v = head_of<In>(p.d_v, batch, group);
    for (int64_t i = 0; i < p.n_tokens; ++i) {
      write_row(d_k + i * p.width, p.width, p.scale, to_k + i * p.d_k.token);
      write_row(d_v + i * p.value_width, p.value_width, 1.0f, to_v + i * p.d_v.token);
    }
  }

  template <class In>
  void one_head(int64_t batch, int64_t head) {
    const In* q = head_of<In>(p.q, batch, head);
    const In* o = head_of<In>(p.o, batch, head);
    const In* d_o = head_of<In>(p.d_o, batch, head);
    pack_rows<S>(q, p.q.token, p.n_tokens, n_rows, p.width, q_rows);
    pack_rows<S>(d_o, p.d_o.token, p.n_tokens, n_rows, p.value_width, do_rows);
    if constexpr (kPairs) {
      pack_pairs<S>(q_rows, n_rows, p.width, q_pairs);
      pack_pairs<S>(do_rows, n_rows, p.value_width, do_pairs);
    }
    const float* of_head = p.lse + (batch * p.n_heads + head) * p.n_tokens;
    for (int64_t i = 0; i < n_rows; ++i) {  // padded queries are zeros: weights of 1, products of 0
      const bool real = i < p.n_tokens;
      lse[i] = real ? of_head[i] * kLog2E : 0.0f;
      delta[i] = real ? dot_rows(o + i * p.o.token, d_o + i * p.d_o.token, p.value_width) : 0.0f;
    }
    __builtin_memset(d_q, 0, static_cast<size_t>(n_rows * p.width) * sizeof *d_q);
    for (int64_t key = 0; key < p.n_tokens; key += kBlockKeys) {
      const int64_t end = visible.last_row(key, n_rows);
      for (int64_t row = key / kRows * kRows; row < end; row += kBlockRows)
        block(key, row, at_most(end, row + kBlockRows));
    }
    In* to = head_of<In>(p.d_q, batch, head);
    for (int64_t i = 0; i < p.n_tokens; ++i)
      write_row(d_q + i * p.width, p.width, p.scale, to + i * p.d_q.token);
  }

  // What the queries [first, end) and the keys [key, key + kBlockKeys) add to the gradients.
  void block(int64_t key, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row += kRows) {
      const int64_t seen = at_most(kBlockKeys, row + kRows - key);
      for (int64_t part = 0; part < kBlockKeys; part += kPanel<S>)
        panel(row, key + part, seen - part, (row - first), part);
      accumulate<S, kRows>(d_q + row * p.width, p.width, p.width, nullptr,
                           slope_rows + (row - first) * kBlockKeys / S::kGroup,
                           kBlockKeys / S::kGroup, 1, k_pairs + key / S::kGroup * p.width,
                           (seen + S::kGroup - 1) / S::kGroup);
    }
    const int64_t n = at_most(kBlockKeys, p.n_tokens - key);
    for (int64_t part = 0; part < n; part += kRows) {
      // Rows before the first of these keys do not see them; an even number is skipped.
      const int64_t skip = at_least(0, key + part - first) / 2 * 2, steps = (end - first - skip) / S::kGroup;
      if (steps <= 0) break;
      if (part + kRows <= kBlockKeys)
        keys_of_tile<kRows>(key + part, part, first + skip, skip, steps);
      else
        keys_of_tile<kBlockKeys % kRows>(key + part, part, first + skip, skip, steps);
    }
  }

  // dV and dK of R keys from `steps` words of queries, the first of which is `row`.
  template <int R>
  void keys_of_tile(int64_t key, int64_t part, int64_t row, int64_t skip, int64_t steps) {
    const int64_t at = skip / S::kGroup * kBlockKeys + part;
    accumulate<S, R>(d_v + key * p.value_width, p.value_width, p.value_width, nullptr,
                     weight_pairs + at, 1, kBlockKeys, do_pairs + row / S::kGroup * p.value_width,
                     steps);
    accumulate<S, R>(d_k + key * p.width, p.width, p.width, nullptr, slope_pairs + at, 1,
                     kBlockKeys, q_pairs + row / S::kGroup * p.width, steps);
  }

  // P and dS of 6 queries and one panel of keys, of which the first `seen` matter; zeros beyond.
  void panel(int64_t row, int64_t key, int64_t seen, int64_t block_row, int64_t part) {
    const int64_t vectors =
        at_least(0, at_most(S::kVectors, (seen + S::kLanes - 1) / S::kLanes));
    if (vectors > 0)
      with_count<S>(vectors, [&](auto count) { some_vectors<count.value>(row, key, block_row, part); });
    for (int64_t v = vectors; v < S::kVectors; ++v)
      for (int64_t r = 0; r < kRows; r += S::kGroup)
        put(Vec{}, Vec{}, Vec{}, Vec{}, block_row + r, part + v * S::kLanes);
  }

  template <int V>
  void some_vectors(int64_t row, int64_t key, int64_t block_row, int64_t part) {
    const int64_t k_step = p.width / S::kGroup, v_step = p.value_width / S::kGroup;
    float weights[kRows][V * S::kLanes];
    const bool masked = !visible.all(row, key, V * S::kLanes);
    const float unit = p.scale * kLog2E;
    {
      Vec sums[kRows][V] = {};
      multiply<S, kRows, V>(sums, q_rows + row * k_step, k_step, 1, k_panels + key * k_step,
                            kPanel<S>, k_step);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          Vec weight = exp2_lanes<S>(sums[r][v] * unit - lse[row + r]);
          if (masked)
            weight = visible.template mask<S>(row + r, key + v * S::kLanes) ? weight : Vec{};
          store<S>(&weights[r][v * S::kLanes], weight);
        }
    }
    Vec sums[kRows][V] = {};
    multiply<S, kRows, V>(sums, do_rows + row * v_step, v_step, 1, v_panels + key * v_step,
                          kPanel<S>, v_step);
    constexpr int second = S::kGroup - 1;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r += S::kGroup)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec p0 = load<S>(&weights[r][v * S::kLanes]);
        const Vec p1 = load<S>(&weights[r + second][v * S::kLanes]);
        const Vec s0 = p0 * (sums[r][v] - delta[row + r]);
        const Vec s1 = p1 * (sums[r + second][v] - delta[row + r + second]);
        put(p0, p1, s0, s1, block_row + r, part + v * S::kLanes);
      }
  }

  // Stores a vector of P and of dS from rows r and, where words hold pairs, r + 1.
  [[gnu::always_inline]] void put(Vec p0, Vec p1, Vec s0, Vec s1, int64_t r, int64_t column) {
    uint32_t* weight = weight_pairs + r / S::kGroup * kBlockKeys + column;
    uint32_t* slope = slope_pairs + r / S::kGroup * kBlockKeys + column;
    if constexpr (kPairs) {
      S::store_pair(weight, p0, p1);
      S::store_pair(slope, s0, s1);
      S::store_row(slope_rows + (r * kBlockKeys + column) / S::kGroup, s0);
      S::store_row(slope_rows + ((r + 1) * kBlockKeys + column) / S::kGroup, s1);
    } else {
      S::store_row(weight, p0);
      S::store_row(slope, s0);
    }
  }
};

}  // namespace
}  // namespace tinyllm
