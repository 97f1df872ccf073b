// Operands of attention rearranged into the words that flash_simd.h multiplies, and results written
// back. Layouts are drawn in kernels/LAYOUT.md. Everything is static: see w8a8.h.
#pragma once
#include "arena.h"
#include "flash_simd.h"

namespace tinyllm {
namespace {

[[gnu::always_inline]] inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
[[gnu::always_inline]] inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <class In>
In* head_of(const Heads& tensor, int64_t batch, int64_t head) {
  return static_cast<In*>(tensor.data) + batch * tensor.batch + head * tensor.head;
}

// Rows [rows][width] as words [padded][width / kGroup], zeros where padded.
template <class S, class In>
void pack_rows(const In* x, int64_t stride, int64_t rows, int64_t padded, int64_t width,
               uint32_t* words) {
  const int64_t row_words = width / S::kGroup;
  for (int64_t i = 0; i < rows; ++i, words += row_words) {
    const In* row = x + i * stride;
    if constexpr (S::kGroup == 2) {
      for (int64_t j = 0; j < width; j += 16)  // a call of memcpy per row took a seventh of the time
        __builtin_memcpy(words + j / 2, row + j, 16 * sizeof(In));
    } else {
      auto* out = reinterpret_cast<float*>(words);
      for (int64_t j = 0; j < width; ++j) out[j] = widen(row[j]);
    }
  }
  __builtin_memset(words, 0, static_cast<size_t>((padded - rows) * row_words) * sizeof *words);
}

// Packed rows as pairs of rows: words [rows / 2][width], each with the two rows' numbers.
template <class S>
void pack_pairs(const uint32_t* words, int64_t rows, int64_t width, uint32_t* pairs) {
  static_assert(S::kGroup == 2);
  const auto* x = reinterpret_cast<const uint16_t*>(words);
  for (int64_t i = 0; i < rows; i += 2, x += 2 * width, pairs += width)
    for (int64_t j = 0; j < width; ++j)
      pairs[j] = x[j] | static_cast<uint32_t>(x[width + j]) << 16;
}

// Keys, or their values, that a register tile meets.
template <class S>
constexpr int64_t kPanel = S::kLanes* S::kVectors;

// One square of words, rows `from_row` and `to_row` words apart, turned.
template <class S>
[[gnu::always_inline]] inline void turn(const uint32_t* from, int64_t from_row, uint32_t* to,
                                        int64_t to_row) {
#ifdef __AVX512F__
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + i * from_row);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // pairs of rows, then of pairs, by words
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)  // x[4 i + j]: rows 4 i .. 4 i + 3, columns j, j + 4, j + 8, j + 12
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      y[4 * j + i] = _mm512_shuffle_i32x4(x[8 * i + j], x[8 * i + 4 + j], 0x88);
      y[4 * j + 2 + i] = _mm512_shuffle_i32x4(x[8 * i + j], x[8 * i + 4 + j], 0xdd);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i *even = y + 4 * j, *odd = y + 4 * j + 2;
    _mm512_storeu_si512(to + j * to_row, _mm512_shuffle_i32x4(even[0], even[1], 0x88));
    _mm512_storeu_si512(to + (j + 4) * to_row, _mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
    _mm512_storeu_si512(to + (j + 8) * to_row, _mm512_shuffle_i32x4(even[0], even[1], 0xdd));
    _mm512_storeu_si512(to + (j + 12) * to_row, _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd));
  }
#else
  for (int64_t j = 0; j < S::kLanes; ++j)
    for (int64_t i = 0; i < S::kLanes; ++i) to[j * to_row + i] = from[i * from_row + j];
#endif
}

// Packed rows [rows][n] turned: panels of kPanel rows, each [n][kPanel]. `rows` is a multiple of it.
template <class S>
void pack_panels(const uint32_t* words, int64_t rows, int64_t n, uint32_t* panels) {
  for (int64_t first = 0; first < rows; first += kPanel<S>)
    for (int64_t part = 0; part < kPanel<S>; part += S::kLanes) {
      const uint32_t* from = words + (first + part) * n;
      uint32_t* to = panels + first * n + part;
      int64_t j = 0;
      for (; j + S::kLanes <= n; j += S::kLanes)
        turn<S>(from + j, n, to + j * kPanel<S>, kPanel<S>);
      for (; j < n; ++j)  // half a square, where a width of 16 k has 8 words over
        for (int64_t i = 0; i < S::kLanes; ++i) to[j * kPanel<S> + i] = from[i * n + j];
    }
}

template <class In>
void write_row(const float* x, int64_t width, float factor, In* y) {
  for (int64_t j = 0; j < width; ++j) narrow(x[j] * factor, y + j);
}

template <class In>
float dot_rows(const In* a, const In* b, int64_t width) {
  float part[16] = {};
  for (int64_t j = 0; j < width; j += 16)
    for (int64_t i = 0; i < 16; ++i) part[i] += widen(a[j + i]) * widen(b[j + i]);
  for (int64_t half = 8; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// Which keys a query sees: those up to itself, within the window, of its own document.
struct Visible {
  int64_t n_tokens, window;
  int32_t* documents;            // [padded], the last one repeated; null: one document
  int32_t *block_low, *block_high;  // least and largest document of each block of keys

  Visible(const Attention& p, Arena& arena)
      : n_tokens(p.n_tokens), window(p.window), documents(nullptr) {
    if (p.documents == nullptr) return;
    const int64_t padded = round_up(n_tokens + kRows, kBlockKeys);
    documents = arena.take<int32_t>(padded);
    block_low = arena.take<int32_t>(padded / kBlockKeys);
    block_high = arena.take<int32_t>(padded / kBlockKeys);
  }

  void fill(const int32_t* of_sequence) {
    if (documents == nullptr) return;
    const int64_t padded = round_up(n_tokens + kRows, kBlockKeys);
    for (int64_t i = 0; i < padded; ++i) documents[i] = of_sequence[at_most(i, n_tokens - 1)];
    for (int64_t i = 0; i < padded; i += kBlockKeys)
      range(i, kBlockKeys, block_low + i / kBlockKeys, block_high + i / kBlockKeys);
  }

  void range(int64_t first, int64_t n, int32_t* low, int32_t* high) const {
    *low = *high = documents[first];
    for (int64_t i = first + 1; i < first + n; ++i) {
      if (documents[i] < *low) *low = documents[i];
      if (documents[i] > *high) *high = documents[i];
    }
  }

  // Whether the rows from `row` share no document with the keys' block that begins at `key`.
  bool apart(int64_t row, int64_t key) const {
    if (documents == nullptr) return false;
    int32_t low, high;
    range(row, kRows, &low, &high);
    return low > block_high[key / kBlockKeys] || high < block_low[key / kBlockKeys];
  }

  // First key, on a block's border, that the rows from `row` can see.
  int64_t first_key(int64_t row) const {
    int64_t key = window > 0 ? at_least(0, row - window + 1) / kBlockKeys * kBlockKeys : 0;
    while (key + kBlockKeys <= row && apart(row, key)) key += kBlockKeys;
    return key;
  }

  // One past the last row of a tile that can see a key of the block that begins at `key`.
  int64_t last_row(int64_t key, int64_t padded_rows) const {
    int64_t end = padded_rows;
    if (window > 0) end = at_most(end, round_up(key + kBlockKeys - 1 + window, kRows));
    while (end - kRows > key && apart(end - kRows, key)) end -= kRows;
    return end;
  }

  // Whether every row of the tile at `row` sees all `n` keys from `key` on.
  bool all(int64_t row, int64_t key, int64_t n) const {
    if (key + n - 1 > row) return false;
    if (window > 0 && key <= row + kRows - 1 - window) return false;
    if (documents == nullptr) return true;
    int32_t low, high;
    range(row, kRows, &low, &high);
    const int64_t block = key / kBlockKeys;
    return low == high && block_low[block] == low && block_high[block] == low;
  }

  // -1 in the lanes whose key, counted from `key`, the query at `row` sees, else 0.
  template <class S>
  [[gnu::always_inline]] typename S::Ints mask(int64_t row, int64_t key) const {
    typename S::Ints keys;
    for (int32_t i = 0; i < S::kLanes; ++i) keys[i] = i;
    keys += static_cast<int32_t>(key);
    typename S::Ints seen = keys <= static_cast<int32_t>(row);
    if (window > 0) seen &= keys > static_cast<int32_t>(row - window);
    if (documents != nullptr) seen &= load_ints<S>(documents + key) == documents[row];
    return seen;
  }
};

}  // namespace
}  // namespace tinyllm
