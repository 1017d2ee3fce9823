// The two products that LoRA-factor gradients and their tangents are made of, on the CPU, for one run of rows:
//
//   project     U = X W^T     a dot product over the features for each row and rank     (W = A, or B^T)
//   accumulate  S = U^T X     each row adds its features, times U, to `rank` sums        (S = grad_B^T, or grad_A)
//
// Both keep a block of ranks x rows (or ranks x vectors) in registers, so one load serves many multiply-adds;
// accumulate keeps it for all rows of the run, so sums touch memory once. Every number is added up in an order that
// does not depend on how the work is divided: the features in a row's own lanes, or one after another within chunks;
// the rows one after another.
//
// With AVX-512, whole blocks of ranks are also worked off "by element": lanes are ranks, and each element is broadcast.
// No lanes are left to be added up, and nothing is transposed, but each product loads an element, which two registers
// to a cycle allow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "r2f/simd.h"

namespace r2f::tiles {

using simd::VectorOf;

// Features projected at once: 8 rows of W stay in the first-level cache.
constexpr int64_t kChunkBytes = 3072;
// Features projected at once by element: what is added up one after another stays short.
constexpr int64_t kElementChunk = 192;
// Rows whose factors are kept at once.
constexpr int64_t kMaxRows = 512;

// Accumulators kept in registers (of 32 with AVX-512, of 16 otherwise), as `ranks` x `others`.
template <int Bytes>
struct Block {
  static constexpr int kAccumulators = Bytes == 64 ? 24 : 12;
  static constexpr int kMaxRanks = Bytes == 64 ? 8 : 4;
  static constexpr int kMaxOthers = Bytes == 64 ? 8 : 6;
  static constexpr int others(int ranks) {
    return kAccumulators / ranks < kMaxOthers ? kAccumulators / ranks : kMaxOthers;
  }
  // Ranks are worked off in blocks of kMaxRanks, and what is left (1 or more) in one of 1, 2, 4 or 6: the last of its
  // ranks may be one of zeros.
  static constexpr int64_t ranks(int64_t left) {
    return left >= kMaxRanks ? kMaxRanks : left + (left > 1 && left % 2 == 1);
  }
  static constexpr int64_t padded(int64_t rank) {
    return rank / kMaxRanks * kMaxRanks + (rank % kMaxRanks == 0 ? 0 : ranks(rank % kMaxRanks));
  }
};

template <typename Acc, int Bytes>
constexpr int64_t whole_vectors(int64_t n) {
  constexpr int64_t kLanes = VectorOf<Acc, Bytes>::kLanes;
  return (n + kLanes - 1) / kLanes * kLanes;
}

// How many of `rank` ranks are worked off by element. (bfloat16 would have to be widened one by one.)
template <typename T, int Bytes>
constexpr int64_t by_element(int64_t rank) {
  constexpr int64_t kWidth = Block<Bytes>::kMaxRanks;
  return Bytes == 64 && !std::is_same_v<T, BFloat16> ? rank / kWidth * kWidth : 0;
}

// The same for `project`, of `features` in whole vectors: a dozen longer rows would compete for the same few places of
// the first-level cache.
template <typename T, int Bytes>
constexpr int64_t projected_by_element(int64_t rank, int64_t features) {
  const bool fits = features * static_cast<int64_t>(sizeof(Accumulation<T>)) <= kChunkBytes;
  return fits ? by_element<T, Bytes>(rank) : 0;
}

// A block of ranks as one register.
template <typename Acc, int Bytes>
using RankVector = typename VectorOf<Acc, Block<Bytes>::kMaxRanks* static_cast<int>(sizeof(Acc))>::type;

// Rows of a matrix, `stride` elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  R2F_INLINE T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
  R2F_INLINE Rows from(int64_t row, int64_t column) const { return {at(row, column), stride}; }
  operator Rows<const T>() const { return {data, stride}; }
};

// U, in panels of kMaxRanks ranks: [panel][row][rank in the panel].
template <typename Acc, int Bytes>
struct Panels {
  static constexpr int64_t kWidth = Block<Bytes>::kMaxRanks;
  Acc* data;
  int64_t rows;
  static int64_t size(int64_t rows, int64_t rank) { return (rank + kWidth - 1) / kWidth * kWidth * rows; }
  R2F_INLINE Acc* at(int64_t row, int64_t rank) const {
    return data + (rank / kWidth * rows + row) * kWidth + rank % kWidth;
  }
  R2F_INLINE Panels from(int64_t row) const { return {data + row * kWidth, rows}; }
};

// u [Tokens, Ranks] = (or, `onto`, +=) x w^T over `features` columns, whole vectors. w is packed: [vector][rank]. u has
// rows of kMaxRanks. `ahead`: the rows that are read later start in memory pages that the hardware does not foresee.
template <typename T, int Bytes, int Ranks, int Tokens>
R2F_INLINE void project_block(Rows<const T> x, const Accumulation<T>* w, int64_t features, int64_t ahead, bool onto,
                              Accumulation<T>* u) {
  using Acc = Accumulation<T>;
  using V = typename VectorOf<Acc, Bytes>::type;
  V sum[Tokens][Ranks] = {};
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes;
  for (int64_t i = 0; i < features; i += kLanes, w += Ranks * kLanes) {
    V token[Tokens];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      token[t] = simd::load_wide<V>(x.at(t, i));
      __builtin_prefetch(x.at(t, i) + ahead);
    }
#pragma GCC unroll 8
    for (int j = 0; j < Ranks; ++j) {
      const V row = simd::load<V>(w + j * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) sum[t][j] += token[t] * row;
    }
  }

  constexpr int kSums = Tokens * Ranks, kAtOnce = 8;
#pragma GCC unroll 8
  for (int first = 0; first < kSums; first += kAtOnce) {
    V some[kAtOnce];
#pragma GCC unroll 8
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = first + k < kSums ? first + k : kSums - 1;
      some[k] = sum[at / Ranks][at % Ranks];
    }
    Acc total[kAtOnce > kLanes ? kAtOnce : kLanes];
    simd::sum_lanes<Acc, Bytes, kAtOnce>(some, total);
#pragma GCC unroll 8
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = first + k;
      if (at >= kSums) break;
      Acc* place = u + at / Ranks * Block<Bytes>::kMaxRanks + at % Ranks;
      *place = onto ? *place + total[k] : total[k];
    }
  }
}

template <typename T, int Bytes, int Ranks>
R2F_INLINE void project_ranks(Rows<const T> x, const Accumulation<T>* w, int64_t tokens, int64_t features, bool onto,
                              Accumulation<T>* u) {
  constexpr int kTokens = Block<Bytes>::others(Ranks), kWidth = Block<Bytes>::kMaxRanks;
  const int64_t ahead = (features < 512 ? 4 : 1) * kTokens * x.stride;
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens)
    project_block<T, Bytes, Ranks, kTokens>(x.from(t, 0), w, features, ahead, onto, u + t * kWidth);
  if constexpr (kTokens > 3) {  // one row alone would wait for its few sums
    for (; t + 3 <= tokens; t += 3)
      project_block<T, Bytes, Ranks, 3>(x.from(t, 0), w, features, ahead, onto, u + t * kWidth);
  }
  for (; t < tokens; ++t) project_block<T, Bytes, Ranks, 1>(x.from(t, 0), w, features, ahead, onto, u + t * kWidth);
}

// u [Tokens, Count blocks of ranks] = (or, `onto`, +=) x w^T, by element. w is packed: [feature][rank], its blocks
// `w_stride` apart, those of u `u_stride`.
template <typename T, int Bytes, int Count, int Tokens>
R2F_INLINE void project_elements(Rows<const T> x, const Accumulation<T>* w, int64_t w_stride, int64_t features,
                                 bool onto, Accumulation<T>* u, int64_t u_stride) {
  using Acc = Accumulation<T>;
  using V = RankVector<Acc, Bytes>;
  constexpr int kWidth = Block<Bytes>::kMaxRanks, kLanes = VectorOf<Acc, Bytes>::kLanes;
  V sum[Tokens][Count] = {};
  for (int64_t i = 0; i < features; i += kLanes) {
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t) __builtin_prefetch(x.at(t, i) + 2 * Tokens * x.stride);
#pragma GCC unroll 2
    for (int64_t k = i; k < i + kLanes; ++k, w += kWidth) {
      V row[Count];
#pragma GCC unroll 2
      for (int c = 0; c < Count; ++c) row[c] = simd::load<V>(w + c * w_stride);
#pragma GCC unroll 12
      for (int t = 0; t < Tokens; ++t) {
        const Acc element = widen(*x.at(t, k));
#pragma GCC unroll 2
        for (int c = 0; c < Count; ++c) sum[t][c] += row[c] * element;
      }
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int c = 0; c < Count; ++c) {
      Acc* place = u + c * u_stride + t * kWidth;
      simd::store(place, onto ? simd::load<V>(place) + sum[t][c] : sum[t][c]);
    }
  }
}

// Ranks j to j + Count blocks of `project`, by element.
template <typename T, int Bytes, int Count>
R2F_INLINE void project_by_element(Rows<const T> x, const Accumulation<T>* w, int64_t tokens, int64_t features,
                                   Panels<Accumulation<T>, Bytes> u, int64_t first, int64_t j) {
  constexpr int kWidth = Block<Bytes>::kMaxRanks;
  const int64_t w_stride = features * kWidth, u_stride = u.rows * kWidth;
  int64_t k = 0;
  do {  // at least once: without features, u = 0
    const int64_t n = std::min(kElementChunk, features - k);
    const Accumulation<T>* wk = w + j * features + k * kWidth;
    int64_t t = 0;
    for (; t + 12 <= tokens; t += 12)
      project_elements<T, Bytes, Count, 12>(x.from(t, k), wk, w_stride, n, k > 0, u.at(first + t, j), u_stride);
    for (; t + 4 <= tokens; t += 4)
      project_elements<T, Bytes, Count, 4>(x.from(t, k), wk, w_stride, n, k > 0, u.at(first + t, j), u_stride);
    for (; t < tokens; ++t)
      project_elements<T, Bytes, Count, 1>(x.from(t, k), wk, w_stride, n, k > 0, u.at(first + t, j), u_stride);
    k += kElementChunk;
  } while (k < features);
}

// u [tokens, rank], from row `first` on, = x w^T with x [tokens, features] and w [rank, features], packed.
template <typename T, int Bytes>
R2F_INLINE void project(Rows<const T> x, const Accumulation<T>* w, int64_t tokens, int64_t features, int64_t rank,
                        Panels<Accumulation<T>, Bytes> u, int64_t first) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Accumulation<T>));
  constexpr int kWidth = Block<Bytes>::kMaxRanks;
  int64_t done = 0;
  if constexpr (by_element<T, Bytes>(kWidth) > 0) {
    for (const int64_t end = projected_by_element<T, Bytes>(rank, features); done < end;) {
      const bool two = done + 2 * kWidth <= end;
      if (two)
        project_by_element<T, Bytes, 2>(x, w, tokens, features, u, first, done);
      else
        project_by_element<T, Bytes, 1>(x, w, tokens, features, u, first, done);
      done += two ? 2 * kWidth : kWidth;
    }
  }
  for (int64_t j = done; j < rank; j += kWidth) {
    int64_t k = 0;
    do {  // at least once: without features, u = 0
      const int64_t n = std::min(kChunk, features - k);
      const Rows<const T> xk = x.from(0, k);
      const Accumulation<T>* wk = w + j * features + Block<Bytes>::ranks(rank - j) * k;
      Accumulation<T>* to = u.at(first, j);
      switch (Block<Bytes>::ranks(rank - j)) {
        case 1: project_ranks<T, Bytes, 1>(xk, wk, tokens, n, k > 0, to); break;
        case 2: project_ranks<T, Bytes, 2>(xk, wk, tokens, n, k > 0, to); break;
        case 4: project_ranks<T, Bytes, 4>(xk, wk, tokens, n, k > 0, to); break;
        default:
          if constexpr (kWidth == 8) {
            if (Block<Bytes>::ranks(rank - j) == 6) {
              project_ranks<T, Bytes, 6>(xk, wk, tokens, n, k > 0, to);
            } else {
              project_ranks<T, Bytes, 8>(xk, wk, tokens, n, k > 0, to);
            }
          }
      }
      k += kChunk;
    } while (k < features);
  }
}

// One term U^T X of a sum.
template <typename T, int Bytes>
struct Term {
  Rows<const T> x;
  Panels<Accumulation<T>, Bytes> u;
};

// Where sums go: scale * S, as [rank, features] or as [features, rank]. Of the features, the first `features` of what
// is padded to whole vectors. While rows of a group are still to come, S itself is kept in `partial` [rank, features].
template <typename Acc>
struct Sums {
  Acc* out;
  int64_t rank, features;  // of the whole matrix
  bool by_feature;
  Acc scale;
  Rows<Acc> partial;
  bool first, last;  // of the group's runs of rows
};

// out [lane][rank] = sum [rank][lane], for the first `ranks` (Ranks, or one less) and the first `count` lanes.
template <typename Acc, int Bytes, int Ranks>
R2F_INLINE void write_by_feature(const typename VectorOf<Acc, Bytes>::type* sum, int64_t ranks, int64_t count, Acc* out,
                                 int64_t stride) {
  using V = typename VectorOf<Acc, Bytes>::type;
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes, kCount = Ranks > 4 ? 8 : Ranks;
  V v[kCount] = {};
#pragma GCC unroll 8
  for (int j = 0; j < Ranks; ++j) v[j] = sum[j];
  simd::transpose<Acc, Bytes, kCount>(v);
  if (kCount == stride && count >= kLanes) {
    std::memcpy(out, v, sizeof(v));
    return;
  }
  Acc all[kLanes][kCount];
  std::memcpy(all, v, sizeof(v));
  const int64_t lanes = std::min<int64_t>(count, kLanes);
  if (ranks == Ranks) {
    for (int64_t i = 0; i < lanes; ++i) std::memcpy(out + i * stride, all[i], Ranks * sizeof(Acc));
  } else {
    for (int64_t i = 0; i < lanes; ++i) std::memcpy(out + i * stride, all[i], (Ranks - 1) * sizeof(Acc));
  }
}

// s [Ranks, Vectors] = the sum of the terms over all rows.
template <typename T, int Bytes, int Ranks, int Vectors>
R2F_INLINE void accumulate_block(const Term<T, Bytes>* terms, int count, int64_t tokens, int64_t j, int64_t column,
                                 int64_t next, const Sums<Accumulation<T>>& sums) {
  using Acc = Accumulation<T>;
  using V = typename VectorOf<Acc, Bytes>::type;
  constexpr int kLanes = VectorOf<Acc, Bytes>::kLanes, kAhead = 8;
  V sum[Vectors][Ranks];
#pragma GCC unroll 8
  for (int c = 0; c < Vectors; ++c) {
#pragma GCC unroll 8
    for (int i = 0; i < Ranks; ++i)
      sum[c][i] = sums.first ? V{} : simd::load<V>(sums.partial.at(j + i, column + c * kLanes));
  }
  for (int k = 0; k < count; ++k) {
    const T* x = terms[k].x.at(0, column);
    const Acc* u = terms[k].u.at(0, j);
    const int64_t stride = terms[k].x.stride;
    for (int64_t t = 0; t < tokens; ++t) {
      // What is read a few rows later; after the last row, the next columns of the first ones.
      const T* ahead = j > 0 ? x : t + kAhead < tokens ? x + kAhead * stride : x + (kAhead - tokens) * stride + next;
      V token[Vectors];
#pragma GCC unroll 8
      for (int c = 0; c < Vectors; ++c) {
        token[c] = simd::load_wide<V>(x + c * kLanes);
        __builtin_prefetch(ahead + c * kLanes);
      }
#pragma GCC unroll 8
      for (int i = 0; i < Ranks; ++i) {
        const Acc factor = u[i];
#pragma GCC unroll 8
        for (int c = 0; c < Vectors; ++c) sum[c][i] += token[c] * factor;
      }
      x += stride, u += Block<Bytes>::kMaxRanks;
    }
  }

#pragma GCC unroll 8
  for (int c = 0; c < Vectors; ++c) {
    const int64_t i = column + c * kLanes, left = sums.features - i, ranks = std::min<int64_t>(Ranks, sums.rank - j);
    if (!sums.last) {
#pragma GCC unroll 8
      for (int r = 0; r < Ranks; ++r) simd::store(sums.partial.at(j + r, i), sum[c][r]);
      continue;
    }
#pragma GCC unroll 8
    for (int r = 0; r < Ranks; ++r) sum[c][r] *= sums.scale;
    if (sums.by_feature) {
      write_by_feature<Acc, Bytes, Ranks>(sum[c], ranks, left, sums.out + i * sums.rank + j, sums.rank);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < Ranks; ++r) {
        if (r >= ranks) break;
        Acc* row = sums.out + (j + r) * sums.features + i;
        if (left >= kLanes) {
          simd::store(row, sum[c][r]);
        } else {
          for (int64_t lane = 0; lane < left; ++lane) row[lane] = sum[c][r][lane];
        }
      }
    }
  }
}

// Columns first <= i < last, whole vectors.
template <typename T, int Bytes, int Ranks, int Vectors>
R2F_INLINE void accumulate_columns(const Term<T, Bytes>* terms, int count, int64_t tokens, int64_t j, int64_t first,
                                   int64_t last, const Sums<Accumulation<T>>& sums) {
  constexpr int kLanes = VectorOf<Accumulation<T>, Bytes>::kLanes;
  int64_t i = first;
  for (; i + Vectors * kLanes <= last; i += Vectors * kLanes)
    accumulate_block<T, Bytes, Ranks, Vectors>(terms, count, tokens, j, i, Vectors * kLanes, sums);
  if constexpr (Vectors > 2) {
    for (; i + 2 * kLanes <= last; i += 2 * kLanes)
      accumulate_block<T, Bytes, Ranks, 2>(terms, count, tokens, j, i, 2 * kLanes, sums);
  }
  for (; i < last; i += kLanes) accumulate_block<T, Bytes, Ranks, 1>(terms, count, tokens, j, i, kLanes, sums);
}

template <typename T, int Bytes>
R2F_INLINE void accumulate_ranks(const Term<T, Bytes>* terms, int count, int64_t tokens, int64_t j, int64_t first,
                                 int64_t last, const Sums<Accumulation<T>>& sums) {
  using B = Block<Bytes>;
  switch (B::ranks(sums.rank - j)) {
    case 1: return accumulate_columns<T, Bytes, 1, B::others(1)>(terms, count, tokens, j, first, last, sums);
    case 2: return accumulate_columns<T, Bytes, 2, B::others(2)>(terms, count, tokens, j, first, last, sums);
    case 4: return accumulate_columns<T, Bytes, 4, B::others(4)>(terms, count, tokens, j, first, last, sums);
    default:
      if constexpr (B::kMaxRanks == 8) {
        if (B::ranks(sums.rank - j) == 6)
          return accumulate_columns<T, Bytes, 6, B::others(6)>(terms, count, tokens, j, first, last, sums);
        return accumulate_columns<T, Bytes, 8, B::others(8)>(terms, count, tokens, j, first, last, sums);
      }
  }
}

// `Features` columns and `Count` blocks of ranks of a sum that is written as [features, rank] and has one run of rows,
// by element.
template <typename T, int Bytes, int Count, int Features>
R2F_INLINE void accumulate_elements(const Term<T, Bytes>* terms, int count, int64_t tokens, int64_t j, int64_t column,
                                    const Sums<Accumulation<T>>& sums) {
  using Acc = Accumulation<T>;
  using V = RankVector<Acc, Bytes>;
  constexpr int kWidth = Block<Bytes>::kMaxRanks, kLanes = VectorOf<Acc, Bytes>::kLanes;
  V sum[Features][Count] = {};
  for (int k = 0; k < count; ++k) {
    const T* x = terms[k].x.at(0, column);
    const Acc* u = terms[k].u.at(0, j);
    const int64_t stride = terms[k].x.stride, panel = terms[k].u.rows * kWidth;
    for (int64_t t = 0; t < tokens; ++t, x += stride, u += kWidth) {
      __builtin_prefetch(x + kLanes);  // the columns that come next
      V row[Count];
#pragma GCC unroll 2
      for (int c = 0; c < Count; ++c) row[c] = simd::load<V>(u + c * panel);
#pragma GCC unroll 12
      for (int i = 0; i < Features; ++i) {
        const Acc element = widen(x[i]);
#pragma GCC unroll 2
        for (int c = 0; c < Count; ++c) sum[i][c] += row[c] * element;
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Features; ++i) {
#pragma GCC unroll 2
    for (int c = 0; c < Count; ++c)
      simd::store(sums.out + (column + i) * sums.rank + j + c * kWidth, sum[i][c] * sums.scale);
  }
}

// The same for ranks j < ranks, whole blocks, and columns from `first` on, as long as `Features` of them are left
// before `last`. Returns the first column that is not done.
template <typename T, int Bytes, int Features>
R2F_INLINE int64_t accumulate_by_element(const Term<T, Bytes>* terms, int count, int64_t tokens, int64_t ranks,
                                         int64_t first, int64_t last, const Sums<Accumulation<T>>& sums) {
  constexpr int kWidth = Block<Bytes>::kMaxRanks;
  int64_t i = first;
  for (; i + Features <= last; i += Features) {
    int64_t j = 0;
    for (; j + 2 * kWidth <= ranks; j += 2 * kWidth)
      accumulate_elements<T, Bytes, 2, Features>(terms, count, tokens, j, i, sums);
    if (j < ranks) accumulate_elements<T, Bytes, 1, Features>(terms, count, tokens, j, i, sums);
  }
  return i;
}

// The sum of the terms, columns first <= i < last (whole vectors), all ranks.
template <typename T, int Bytes>
R2F_INLINE void accumulate(const Term<T, Bytes>* terms, int count, int64_t tokens, int64_t first, int64_t last,
                           const Sums<Accumulation<T>>& sums) {
  constexpr int64_t kLanes = VectorOf<Accumulation<T>, Bytes>::kLanes, kMaxRanks = Block<Bytes>::kMaxRanks;
  int64_t done = 0;  // ranks
  if constexpr (by_element<T, Bytes>(kMaxRanks) > 0) {
    // Of one block, the transpose is cheap; partial sums lie the other way round.
    if (sums.by_feature && sums.first && sums.last && sums.rank >= 2 * kMaxRanks) {
      done = by_element<T, Bytes>(sums.rank);
      const int64_t end = std::min(last, sums.features);
      int64_t i = accumulate_by_element<T, Bytes, 12>(terms, count, tokens, done, first, end, sums);
      i = accumulate_by_element<T, Bytes, 4>(terms, count, tokens, done, i, end, sums);
      accumulate_by_element<T, Bytes, 1>(terms, count, tokens, done, i, end, sums);
    }
  }
  // Few columns at a time: they stay in the cache for all ranks.
  const int64_t stripe = sums.rank <= kMaxRanks ? last - first : Block<Bytes>::others(kMaxRanks) * kLanes;
  for (int64_t i = first; i < last; i += stripe)
    for (int64_t j = done; j < sums.rank; j += kMaxRanks)
      accumulate_ranks<T, Bytes>(terms, count, tokens, j, i, std::min(i + stripe, last), sums);
}

// W [rank, features], element [j][i] at from[j * rank_stride + i * feature_stride], packed for `project`: panel by
// panel, [feature][rank] by element, else [vector][rank][lane]; padded with zeros to whole vectors and blocks of ranks.
template <typename T, int Bytes>
R2F_INLINE void pack(const T* from, int64_t rank_stride, int64_t feature_stride, int64_t rank, int64_t features,
                     Accumulation<T>* to) {
  constexpr int64_t kLanes = VectorOf<Accumulation<T>, Bytes>::kLanes, kWidth = Block<Bytes>::kMaxRanks;
  const int64_t whole = whole_vectors<Accumulation<T>, Bytes>(features);
  for (int64_t j = 0; j < rank; j += kWidth) {
    const int64_t ranks = std::min(rank - j, kWidth), block = Block<Bytes>::ranks(rank - j);
    if (j < projected_by_element<T, Bytes>(rank, whole)) {
      for (int64_t i = 0; i < features; ++i, to += kWidth)
        for (int64_t r = 0; r < kWidth; ++r) to[r] = widen(from[(j + r) * rank_stride + i * feature_stride]);
      to = std::fill_n(to, (whole - features) * kWidth, Accumulation<T>(0));
      continue;
    }
    for (int64_t i = 0; i < features; i += kLanes) {
      const int64_t lanes = std::min(features - i, kLanes);
      for (int64_t r = 0; r < ranks; ++r, to += kLanes) {
        const T* row = from + (j + r) * rank_stride + i * feature_stride;
        for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = widen(row[lane * feature_stride]);
        std::fill(to + lanes, to + kLanes, Accumulation<T>(0));
      }
      std::fill_n(to, (block - ranks) * kLanes, Accumulation<T>(0));
      to += (block - ranks) * kLanes;
    }
  }
}

// ---- Memory and edges
// ------------------------------------------------------------------------------------------------

// Cache-aligned memory that nobody has written, handed out as matrices.
template <typename Acc>
class Scratch {
 public:
  explicit Scratch(int64_t elements)
      : memory_(static_cast<Acc*>(::operator new[](static_cast<size_t>(elements) * sizeof(Acc), kAlignment))),
        next_(memory_.get()) {}

  // Rows are never a multiple of 4 KB apart: those compete for the same few places of the first-level cache.
  static int64_t stride(int64_t columns) { return (columns + 63) / 64 * 64 + 16; }
  static int64_t size(int64_t rows, int64_t columns) { return rows * stride(columns); }

  Acc* take(int64_t elements) {
    Acc* piece = next_;
    next_ += (elements + 15) / 16 * 16;
    return piece;
  }
  Rows<Acc> take(int64_t rows, int64_t columns) { return {take(size(rows, columns)), stride(columns)}; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(Acc* p) const { ::operator delete[](p, kAlignment); }
  };
  std::unique_ptr<Acc[], Free> memory_;
  Acc* next_;
};

// Rows of `features` elements, columns first <= i < last (whole vectors): in place, or, where there is `room`, copied
// there and padded with zeros.
template <typename T>
R2F_INLINE Rows<const T> padded_rows(const T* from, int64_t features, int64_t count, int64_t first, int64_t last,
                                     Rows<T> room) {
  if (room.data == nullptr) return {from, features};
  const int64_t end = std::min(last, features);
  for (int64_t i = 0; i < count; ++i) {
    if (first < end) std::memcpy(room.at(i, first), from + i * features + first, (end - first) * sizeof(T));
    for (int64_t k = std::max(first, features); k < last; ++k) *room.at(i, k) = T{};
  }
  return room;
}

}  // namespace r2f::tiles
