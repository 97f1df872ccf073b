// The pass of decoder.h: phases that all threads go through together, sharing the outputs. The arithmetic
// is that of the chosen instruction set.
#include "decoder.h"

#include <algorithm>
#include <numeric>

#include "activations.h"
#include "kv_cache.h"
#include "pool.h"
#include "scratch.h"

namespace tinyllm {
namespace {

constexpr int64_t kRows = 128;               // rows that go through the layers together
constexpr int64_t kRowsPerPart = 8;          // of a head, that a thread takes at a time
constexpr int64_t kWorkPerThread = 1 << 15;  // multiplications per layer; meeting costs 0.2 us each time

// One thread's way through the phases.
class Pass {
 public:
  Pass(const Rows& rows, const Team& team)
      : r_(rows),
        m_(rows.model),
        t_(rows.tokens),
        isa_(rows.isa),
        team_(team),
        cache_{rows.tokens, rows.isa, rows.model.d_head},
        own_(Arena{rows.own + rows.own_bytes * team.thread}, rows.widest, rows.longest(), rows.shared_keys(),
             rows.model.terms) {}

  void run() {
    team_.share(r_.n, [&](int64_t row) { embed(row); });
    team_.meet();
    for (int64_t l = 0; l < m_.n_layers; ++l) {
      const Layer& layer = m_.layers[l];
      project(layer, l, quantize(r_.x, m_.d, m_.d, layer.norm_attention));
      team_.meet();
      attend(layer, l);
      team_.meet();
      const int64_t d_attended = m_.n_heads * m_.d_head;
      add_product(*layer.o, quantize(r_.attended, d_attended, d_attended, nullptr));
      team_.meet();
      gate(*layer.gate_up, quantize(r_.x, m_.d, m_.d, layer.norm_mlp));
      team_.meet();
      add_product(*layer.down, quantize(r_.hidden, r_.padded_ff, m_.d_ff, nullptr));
      team_.meet();
    }
    finish();
  }

 private:
  const Rows& r_;
  const Decoder& m_;
  const Tokens& t_;
  const Isa& isa_;
  const Team& team_;
  const KvCache cache_;
  Own own_;

  void embed(int64_t row) {
    const int64_t id = t_.ids[r_.first + row];
    const int8_t* from = m_.embedding + id * m_.d;
    float* to = r_.x + row * m_.d;
    const float scale = m_.embedding_scale[id];
    for (int64_t i = 0; i < m_.d; ++i) to[i] = static_cast<float>(from[i]) * scale;
  }

  void quantize_row(const float* x, int64_t k, const float* norm, int8_t* q, float* scale) {
    if (norm != nullptr) {
      isa_.rms_norm(x, norm, k, m_.eps, own_.normed);
      x = own_.normed;
    }
    for (int64_t i = k; i < round_up(k, kGroup); ++i) q[i] = 0;  // meets padded, zero weights
    *scale = isa_.quantize(x, k, q, isa_.flip);
    if (m_.terms == 1) return;
    for (int64_t i = 0; i < k; ++i) {
      const auto rounded = static_cast<int8_t>(q[i] ^ isa_.flip);
      own_.normed[i] = x[i] - static_cast<float>(rounded) * *scale;
    }
    for (int64_t i = k; i < round_up(k, kGroup); ++i) q[r_.widest + i] = 0;
    scale[1] = isa_.quantize(own_.normed, k, q + r_.widest, isa_.flip);
  }

  // The INT8 inputs of a layer. A single row every thread makes for itself: cheaper than meeting.
  Inputs quantize(const float* x, int64_t stride, int64_t k, const float* norm) {
    if (r_.n == 1) {
      quantize_row(x, k, norm, own_.q, own_.scale);
      return {own_.q, own_.scale, r_.widest};
    }
    team_.share(r_.n, [&](int64_t row) {
      const int64_t term = row * m_.terms;
      quantize_row(x + row * stride, k, norm, r_.inputs.q + term * r_.widest, r_.inputs.scale + term);
    });
    team_.meet();
    return r_.inputs;
  }

  // y = inputs W^T for some rows and the panel of outputs that begins at `first`; y may be own_.tile.
  void multiply_panel(const Weight& w, const Inputs& in, int64_t row, int64_t rows, int64_t first, float* y,
                      int64_t y_stride) {
    const int8_t* q = in.q + row * m_.terms * in.stride;
    const float* scale = in.scale + row * m_.terms;
    if (m_.terms == 1) return isa_.tile(w)(q, in.stride, scale, rows, w, first, y, y_stride);
    const int64_t outputs = std::min(kPanel, w.n - first);
    for (int64_t i = 0; i < rows; i += kRowsPerTile) {
      const int64_t n = std::min(kRowsPerTile, rows - i);
      isa_.tile(w)(q + 2 * i * in.stride, in.stride, scale + 2 * i, 2 * n, w, first, own_.tile, kPanel);
      for (int64_t j = 0; j < n; ++j) {
        const float *high = own_.tile + 2 * j * kPanel, *low = high + kPanel;
        for (int64_t k = 0; k < outputs; ++k) y[(i + j) * y_stride + k] = high[k] + low[k];
      }
    }
  }

  // Queries, keys and values. A part ends where a panel and a head end, so who multiplies can turn and store as well,
  // from its own cache: as a phase of its own that was up to 2 % of a token (d 768).
  void project(const Layer& layer, int64_t l, const Inputs& in) {
    const Weight& w = *layer.qkv;
    const int64_t part = std::lcm(kPanel, m_.d_head);
    team_.share(round_up(w.n, part) / part, [&](int64_t i) {
      const int64_t first = i * part, end = std::min(first + part, w.n);
      for (int64_t p = first; p < end; p += kPanel) multiply_panel(w, in, 0, r_.n, p, r_.qkv + p, w.n);
      for (int64_t row = 0; row < r_.n; ++row)
        for (int64_t head = first / m_.d_head; head < end / m_.d_head; ++head) turn_and_store(layer, l, head, row);
    });
  }

  // y = inputs W^T in tiles: finish(row, output, tile row) for each row of each panel.
  template <class Finish>
  void multiply_tiles(const Weight& w, const Inputs& in, Finish finish) {
    const int64_t panels = round_up(w.n, kPanel) / kPanel;
    team_.share(panels, [&](int64_t p) {
      for (int64_t i = 0; i < r_.n; i += kRowsPerTile) {
        const int64_t rows = std::min(kRowsPerTile, r_.n - i), first = p * kPanel;
        multiply_panel(w, in, i, rows, first, own_.tile, kPanel);
        for (int64_t j = 0; j < rows; ++j) finish(i + j, first, own_.tile + j * kPanel);
      }
    });
  }

  void add_product(const Weight& w, const Inputs& in) {
    multiply_tiles(w, in, [&](int64_t row, int64_t first, const float* tile) {
      isa_.add(tile, std::min(kPanel, m_.d - first), r_.x + row * m_.d + first);
    });
  }

  void gate(const Weight& w, const Inputs& in) {
    multiply_tiles(w, in, [&](int64_t row, int64_t first, const float* tile) {
      const bool rotated = first / 2 + kHadamard <= m_.d_ff;  // a shorter last block stays
      isa_.gate(tile, tile + kHadamard, rotated, r_.hidden + row * r_.padded_ff + first / 2);
    });
  }

  // body(head, first, end) for some rows at a time. Heads outside: their numbers stay in a thread's own cache.
  template <class Body>
  void share_heads(int64_t heads, Body body) {
    const int64_t parts = round_up(r_.n, kRowsPerPart) / kRowsPerPart;
    team_.share(heads * parts, [&](int64_t i) {
      const int64_t first = i % parts * kRowsPerPart;
      body(i / parts, first, std::min(first + kRowsPerPart, r_.n));
    });
  }

  // Norm and rotation of a query or key; keys and values go into the cache.
  void turn_and_store(const Layer& layer, int64_t l, int64_t head, int64_t row) {
    const int64_t position = r_.places[row].position;
    float* x = r_.qkv + row * r_.n_qkv + head * m_.d_head;
    const int64_t key = head - m_.n_heads, value = key - m_.n_kv_heads;
    if (value < 0) {
      const float* norm = key < 0 ? layer.norm_q : layer.norm_k;
      if (norm != nullptr) isa_.rms_norm(x, norm, m_.d_head, m_.eps, x);
      const int64_t angle = position * (m_.d_head / 2);
      isa_.rotate(x, m_.cosines + angle, m_.sines + angle, m_.d_head / 2);
    }
    if (key < 0) return;
    const int64_t head_start = cache_.head_start(l, r_.places[row].sequence, value < 0 ? key : value);
    cache_.store(value < 0, head_start + position * t_.position_stride, x);
  }

  // What the query in `row` sees of key-value head `group`.
  CachedHead cached(const Layer& layer, int64_t l, int64_t row, int64_t group) const {
    const int64_t n_keys = r_.places[row].position + 1;
    const int64_t skipped = layer.window > 0 ? std::max<int64_t>(0, n_keys - layer.window) : 0;
    const bool is_last = r_.n > 1 || group + 1 == m_.n_kv_heads;
    return cache_.positions(cache_.head_start(l, r_.places[row].sequence, group), skipped, n_keys, !is_last);
  }

  void attend(const Layer& layer, int64_t l) {
    const int64_t per_group = m_.n_heads / m_.n_kv_heads, width = m_.n_heads * m_.d_head;
    const bool shared = r_.shared_keys() > 0 && layer.window == 0;
    const void* opened = nullptr;  // the keys of the head in own_
    share_heads(m_.n_heads, [&](int64_t head, int64_t first, int64_t end) {
      for (int64_t row = first, rows; row < end; row += rows) {
        const CachedHead seen = cached(layer, l, row, head / per_group);
        const float* q = r_.qkv + row * r_.n_qkv + head * m_.d_head;
        float* y = r_.attended + row * width + head * m_.d_head;
        if (shared) {
          const int64_t left = r_.rows_left(row);
          if (seen.keys != opened)
            isa_.open_head(cached(layer, l, row + left - 1, head / per_group), m_.d_head, own_.keys, own_.values);
          opened = seen.keys;
          rows = std::min(left, end - row);
          const bool scaled = seen.stored == Stored::kInt8;
          const OpenHead open{own_.keys, own_.values, scaled ? seen.key_scale : nullptr,
                              scaled ? seen.value_scale : nullptr};
          isa_.attend_rows(q, r_.n_qkv, rows, open, seen.n_keys, m_.d_head, own_.scores, y, width);
        } else {
          rows = 1;
          isa_.attend(q, seen, m_.d_head, own_.scores, y);
        }
      }
    });
  }

  void finish() {
    if (t_.hidden != nullptr) {
      team_.share(r_.n, [&](int64_t row) {
        isa_.rms_norm(r_.x + row * m_.d, m_.norm, m_.d, m_.eps, t_.hidden + (r_.first + row) * m_.d);
      });
      team_.meet();
    }
    if (t_.logits == nullptr) return;
    const Weight& w = *m_.head;
    const int64_t panels = round_up(w.n, kPanel) / kPanel;
    const Inputs in = quantize(r_.x, m_.d, m_.d, m_.norm);
    team_.share(panels, [&](int64_t p) {
      for (int64_t i = 0; i < r_.n; ++i) {  // rows that are a sequence's last
        if (!r_.places[i].is_last) continue;
        const int64_t rows = t_.n_tokens == 1 ? r_.n - i : 1;
        multiply_panel(w, in, i, rows, p * kPanel, t_.logits + r_.places[i].sequence * w.n + p * kPanel, w.n);
        i += rows - 1;
      }
    });
  }
};

void run_pass(void* context, const Team& team) {
  Pass(*static_cast<const Rows*>(context), team).run();
}

}  // namespace
}  // namespace tinyllm

using namespace tinyllm;

int tinyllm_decode(const Decoder* decoder, const Tokens* tokens, int64_t threads) {
  const int64_t total = tokens->n_sequences * tokens->n_tokens;
  if (total < 1 || decoder->n_layers < 1 || threads < 1) return -1;
  for (int64_t i = 0; i < total; ++i)
    if (tokens->ids[i] < 0 || tokens->ids[i] >= decoder->head->n) return -1;
  const int64_t most = std::min(total, kRows);
  const Layer& layer = decoder->layers[0];
  const int64_t per_row = layer.qkv->n * layer.qkv->k + 3 * decoder->d * decoder->d_ff;
  threads = std::clamp<int64_t>(most * per_row / kWorkPerThread, 1, threads);
  thread_local Scratch scratch;
  void* memory = scratch.reserve(static_cast<size_t>(Rows(*decoder, *tokens, most, threads, nullptr).n_bytes));
  if (memory == nullptr) return -2;
  Rows rows(*decoder, *tokens, most, threads, static_cast<char*>(memory));
  for (int64_t first = 0; first < total; first += most) {
    rows.begin(first, std::min(most, total - first));
    run_team(static_cast<int>(threads), run_pass, &rows);
  }
  return 0;
}
