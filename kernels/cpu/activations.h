// What a pass of decoder.h works on: the rows of activations that its threads share, and what each has for itself.
//
// All of it lies in one piece of memory that the caller reserves; made with a null base, `Rows` only counts the bytes.
#pragma once
#include <algorithm>

#include "arena.h"
#include "decoder.h"

namespace tinyllm {
namespace {

constexpr int64_t kRowsPerTile = 48;  // their outputs of one panel, 12 KB a term, stay in the first cache
constexpr int64_t kShared = 8;        // queries that share keys, from which on a head is opened for them

// Rows of INT8 inputs and their scales; the terms of an input follow each other.
struct Inputs {
  int8_t* q;
  float* scale;
  int64_t stride;
};

// What a thread has for itself.
struct Own {
  float* tile;             // [terms kRowsPerTile][kPanel], outputs
  float *normed, *scores;  // a row; the scores of kTogether queries
  float *keys, *values;    // of an open head
  int8_t* q;               // [terms][widest], a row's inputs, their scales:
  float* scale;
  int64_t n_bytes;

  Own(Arena arena, int64_t widest, int64_t longest, int64_t shared, int64_t terms)
      : tile(arena.take<float>(terms * kRowsPerTile * kPanel)),
        normed(arena.take<float>(widest)),
        scores(arena.take<float>(kTogether * longest)),
        keys(arena.take<float>(shared)),
        values(arena.take<float>(shared)),
        q(arena.take<int8_t>(terms * widest)),
        scale(arena.take<float>(terms)),
        n_bytes(arena.used) {}
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
  float *x, *qkv, *attended, *hidden;  // [n][D], [n][n_qkv], [n][H K], [n][padded_ff]
  Place* places;                       // [n]
  Inputs inputs;                       // [n][terms][widest], of one linear layer after another
  char* own;                           // each thread's own memory, one piece after the other
  int64_t own_bytes, n_bytes;

  Rows(const Decoder& m, const Tokens& t, int64_t most, int64_t threads, char* base)
      : model(m),
        tokens(t),
        isa(isa_of(m.head->isa)),
        first(0),
        n(most),
        n_qkv((m.n_heads + 2 * m.n_kv_heads) * m.d_head),
        padded_ff(round_up(m.d_ff, kHadamard)),
        widest(round_up(std::max({m.d, padded_ff, m.n_heads * m.d_head}), 64)) {
    Arena arena{base};
    places = arena.take<Place>(most);
    x = arena.take<float>(most * m.d);
    qkv = arena.take<float>(most * n_qkv);
    attended = arena.take<float>(most * m.n_heads * m.d_head);
    hidden = arena.take<float>(most * padded_ff);
    inputs = {arena.take<int8_t>(most * m.terms * widest), arena.take<float>(most * m.terms), widest};
    own_bytes = Own(Arena{nullptr}, widest, longest(), shared_keys(), m.terms).n_bytes;
    own = arena.take<char>(threads * own_bytes);
    n_bytes = arena.used;
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

  // The rows from `row` on that belong to its sequence.
  int64_t rows_left(int64_t row) const {
    const Place& place = places[row];
    return std::min(n - row, tokens.starts[place.sequence] + tokens.n_tokens - place.position);
  }

  // Most positions that a query sees, in whole blocks.
  int64_t longest() const {
    const int64_t start = *std::max_element(tokens.starts, tokens.starts + tokens.n_sequences);
    return round_up(start + tokens.n_tokens, kLanes);
  }

  // Numbers of a head's keys, if so many queries share them that opening it pays.
  int64_t shared_keys() const {
    const bool pays = tokens.n_tokens * (model.n_heads / model.n_kv_heads) >= kShared;
    return pays ? longest() * model.d_head : 0;
  }
};

}  // namespace
}  // namespace tinyllm
