// The pass of decoder.h: phases that all threads go through together, sharing the outputs. The arithmetic
// is that of the chosen instruction set.
#include "decoder.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "pool.h"
#include "scratch.h"

namespace tinyllm {
namespace {

constexpr int64_t kRows = 128;         // rows that go through the layers together
constexpr int64_t kRowsPerTile = 48;   // their outputs of one panel, 12 KB, stay in the first cache
constexpr int64_t kWidened = 4;        // queries that share keys in bf16, from which on they are widened once
constexpr int64_t kWorkPerThread = 1 << 15;  // multiplications per layer; meeting costs 0.2 us each time

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Hands out parts of one piece of memory; with a null base it only counts.
struct Carver {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t n) {
    auto* part = reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof(T)), 64));
    return part;
  }
};

// Rows of INT8 inputs and their scales; the terms of a row lie one behind the other.
struct Inputs {
  int8_t* q;
  float* scale;
  int64_t stride;
};

// What a thread has for itself.
struct Own {
  float *tile, *normed, *scores, *scale, *keys, *values;
  int8_t* q;
  size_t bytes;

  Own(Carver carve, int64_t widest, int64_t longest, int64_t widened, int64_t terms)
      : tile(carve.take<float>(terms * kRowsPerTile * kPanel)),
        normed(carve.take<float>(widest)),
        scores(carve.take<float>(longest)),
        scale(carve.take<float>(terms)),
        keys(carve.take<float>(widened)),
        values(carve.take<float>(widened)),
        q(carve.take<int8_t>(terms * widest)),
        bytes(carve.used) {}
};

// Where a row belongs.
struct Place {
  int64_t sequence, position;
  bool is_last;  // of the new tokens of its sequence
};

// What all threads share: the rows [first, first + n) of a pass and their numbers on the way.
struct Rows {
  const Decoder& model;
  const Tokens& tokens;
  const Isa& isa;
  int64_t first, n, n_qkv, padded_ff, widest;
  float *x, *qkv, *attended, *hidden;
  Place* places;
  Inputs inputs;
  char* own;          // each thread's own memory, one piece after the other
  size_t own_bytes, bytes;

  Rows(const Decoder& m, const Tokens& t, int64_t most, int64_t threads, char* base)
      : model(m),
        tokens(t),
        isa(isa_of(m.head->isa)),
        first(0),
        n(most),
        n_qkv((m.n_heads + 2 * m.n_kv_heads) * m.d_head),
        padded_ff(round_up(m.d_ff, 32)),
        widest(round_up(std::max({m.d, padded_ff, m.n_heads * m.d_head}), 64)) {
    Carver carve{base};
    places = carve.take<Place>(most);
    x = carve.take<float>(most * m.d);
    qkv = carve.take<float>(most * n_qkv);
    attended = carve.take<float>(most * m.n_heads * m.d_head);
    hidden = carve.take<float>(most * padded_ff);
    inputs = {carve.take<int8_t>(most * m.terms * widest), carve.take<float>(most * m.terms), widest};
    own_bytes = Own(Carver{nullptr}, widest, longest(), widened(), m.terms).bytes;
    own = carve.take<char>(threads * static_cast<int64_t>(own_bytes));
    bytes = carve.used;
  }

  // Go on with the rows from `at`.
  void begin(int64_t at, int64_t n_rows) {
    first = at;
    n = n_rows;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t sequence = (at + i) / tokens.n_tokens, token = (at + i) % tokens.n_tokens;
      places[i] = {sequence, tokens.starts[sequence] + token, token == tokens.n_tokens - 1};
    }
  }
  int64_t longest() const {
    return *std::max_element(tokens.starts, tokens.starts + tokens.n_sequences) + tokens.n_tokens;
  }
  // Numbers of a head's keys, if they are widened before use.
  int64_t widened() const {
    const bool shared = tokens.n_tokens * (model.n_heads / model.n_kv_heads) >= kWidened;
    return shared && tokens.stored == Stored::kBf16 ? longest() * model.d_head : 0;
  }
};

// One thread's way through the phases.
class Pass {
 public:
  Pass(const Rows& rows, const Team& team)
      : r_(rows),
        m_(rows.model),
        t_(rows.tokens),
        isa_(rows.isa),
        team_(team),
        own_(Carver{rows.own + rows.own_bytes * static_cast<size_t>(team.thread)}, rows.widest, rows.longest(),
             rows.widened(), rows.model.terms) {}

  void run() {
    team_.share(r_.n, [&](int64_t row) { embed(row); });
    team_.meet();
    for (int64_t l = 0; l < m_.n_layers; ++l) {
      const Layer& layer = m_.layers[l];
      multiply(*layer.qkv, quantize(r_.x, m_.d, m_.d, layer.norm_attention), r_.qkv, r_.n_qkv);
      team_.meet();
      turn_and_store(layer, l);
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

  // y = inputs W^T.
  void multiply(const Weight& w, const Inputs& in, float* y, int64_t y_stride) {
    const int64_t panels = round_up(w.n, kPanel) / kPanel;
    team_.share(panels, [&](int64_t p) {
      multiply_panel(w, in, 0, r_.n, p * kPanel, y + p * kPanel, y_stride);
    });
  }

  // The same in tiles: finish(row, output, tile row) for each row of each panel.
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
      float* hidden = r_.hidden + row * r_.padded_ff + first / 2;
      isa_.swiglu(tile, tile + kHadamard, kHadamard, hidden);
      if (first / 2 + kHadamard <= m_.d_ff) isa_.hadamard(hidden);  // a shorter last block stays
    });
  }

  int64_t cache_offset(int64_t layer, int64_t row, int64_t group) const {
    return layer * t_.layer_stride + r_.places[row].sequence * t_.sequence_stride + group * t_.head_stride;
  }

  void store(void* cache, float* scale, int64_t offset, const float* x) const {
    switch (t_.stored) {
      case Stored::kFloat:
        std::memcpy(static_cast<float*>(cache) + offset, x, static_cast<size_t>(m_.d_head) * sizeof(float));
        return;
      case Stored::kBf16:
        isa_.narrow(x, m_.d_head, static_cast<uint16_t*>(cache) + offset);
        return;
      case Stored::kInt8:
        scale[offset / t_.position_stride] = isa_.quantize(x, m_.d_head, static_cast<int8_t*>(cache) + offset, 0);
    }
  }

  // Norm and rotation of queries and keys; keys and values go into the cache.
  void turn_and_store(const Layer& layer, int64_t l) {
    const int64_t heads = m_.n_heads + 2 * m_.n_kv_heads;
    team_.share(r_.n * heads, [&](int64_t i) {
      const int64_t row = i / heads, head = i % heads, position = r_.places[row].position;
      float* x = r_.qkv + row * r_.n_qkv + head * m_.d_head;
      const int64_t key = head - m_.n_heads, value = key - m_.n_kv_heads;
      if (value < 0) {
        const float* norm = key < 0 ? layer.norm_q : layer.norm_k;
        if (norm != nullptr) isa_.rms_norm(x, norm, m_.d_head, m_.eps, x);
        const int64_t angle = position * (m_.d_head / 2);
        isa_.rotate(x, m_.cosines + angle, m_.sines + angle, m_.d_head / 2);
      }
      if (key < 0) return;
      const int64_t offset = cache_offset(l, row, value < 0 ? key : value) + position * t_.position_stride;
      store(value < 0 ? t_.keys : t_.values, value < 0 ? t_.key_scale : t_.value_scale, offset, x);
    });
  }

  // What the query in `row` sees of key-value head `group`.
  CachedHead cached(const Layer& layer, int64_t l, int64_t row, int64_t group) const {
    const int64_t n_keys = r_.places[row].position + 1;
    const int64_t skipped = layer.window > 0 ? std::max<int64_t>(0, n_keys - layer.window) : 0;
    const int64_t offset = cache_offset(l, row, group) + skipped * t_.position_stride;
    const int64_t bytes = t_.stored == Stored::kFloat ? 4 : t_.stored == Stored::kBf16 ? 2 : 1;
    const int64_t first = t_.stored == Stored::kInt8 ? offset / t_.position_stride : 0;
    const auto* keys = static_cast<const char*>(t_.keys) + offset * bytes;
    const bool is_last = r_.n > 1 || group + 1 == m_.n_kv_heads;
    return {keys, static_cast<const char*>(t_.values) + offset * bytes,
            t_.key_scale + first, t_.value_scale + first,
            is_last ? nullptr : keys + t_.head_stride * bytes,
            t_.position_stride, n_keys - skipped, t_.stored};
  }

  // The same numbers in fp32, in this thread's memory, where `from` positions are already.
  CachedHead widened(const CachedHead& head, int64_t from) const {
    for (int64_t s = from; s < head.n_keys; ++s) {
      isa_.widen(static_cast<const uint16_t*>(head.keys) + s * head.stride, m_.d_head, own_.keys + s * m_.d_head);
      isa_.widen(static_cast<const uint16_t*>(head.values) + s * head.stride, m_.d_head, own_.values + s * m_.d_head);
    }
    return {own_.keys, own_.values, nullptr, nullptr, nullptr, m_.d_head, head.n_keys, Stored::kFloat};
  }

  void attend(const Layer& layer, int64_t l) {
    const int64_t per_group = m_.n_heads / m_.n_kv_heads;
    const void* widened_keys = nullptr;
    int64_t n_widened = 0;
    // Heads outside, so that a head's keys stay in the cache for all rows.
    team_.share(m_.n_heads * r_.n, [&](int64_t task) {
      const int64_t head = task / r_.n, row = task % r_.n;
      CachedHead seen = cached(layer, l, row, head / per_group);
      if (r_.widened() > 0) {
        if (seen.keys != widened_keys) n_widened = 0;  // another head, or a window that moves
        widened_keys = seen.keys;
        const int64_t known = n_widened;
        n_widened = std::max(known, seen.n_keys);
        seen = widened(seen, known);
      }
      isa_.attend(r_.qkv + row * r_.n_qkv + head * m_.d_head, seen, m_.d_head, own_.scores,
                  r_.attended + (row * m_.n_heads + head) * m_.d_head);
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
  void* memory = scratch.reserve(Rows(*decoder, *tokens, most, threads, nullptr).bytes);
  if (memory == nullptr) return -2;
  Rows rows(*decoder, *tokens, most, threads, static_cast<char*>(memory));
  for (int64_t first = 0; first < total; first += most) {
    rows.begin(first, std::min(most, total - first));
    run_team(static_cast<int>(threads), run_pass, &rows);
  }
  return 0;
}

void tinyllm_large_pages(void* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(start, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // refused: small pages, as before
#else
  (void)start, (void)bytes;
#endif
}
