// The loops that compute the moments of a channel norm: means, and sums of squared deviations from the means.
//
// The moments are those of a plane, or with channels last, of every channel in a piece of a sample's rows
// (channel_norm.h).
#pragma once

#include "../channel_norm.h"
#include "channel_rows.h"
#include "chunk.h"
#include "moments_rows.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

template <class S, class T>
void channel_moments_of_planes(const ChannelMoments& a, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* const elements[] = {row_at<T>(a.input, plane, a.size)};
    RowMoments<S> moments[1];
    moments_of(elements, a.size, moments);
    static_cast<S*>(a.first)[plane] = moments[0].mean;
    static_cast<S*>(a.second)[plane] = moments[0].squares;
  }
}

// For each channel, in one pass, shifted by the mean of the piece's first few rows; moments_rows.h shows the accuracy.
template <class S, class T>
void channel_moments_of_rows(const ChannelMoments& a, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t first = piece / a.pieces * a.size + a.piece_begin(piece);
    const int64_t count = a.piece_end(piece) - a.piece_begin(piece), few = count < 8 ? count : 8;
    const Vec<S> share(1.0 / double(count)), few_share(1.0 / double(few));
    for (int64_t j0 = 0; j0 < a.channels; j0 += chunk_columns) {
      const int64_t n = a.channels - j0 < chunk_columns ? a.channels - j0 : chunk_columns;
      const T* x = row_at<T>(a.input, first, a.channels) + j0;
      S* mean = static_cast<S*>(a.first) + piece * a.channels + j0;
      S* squares = static_cast<S*>(a.second) + piece * a.channels + j0;
      Chunk<S> guess, sum, sum_squares;
      step<S>(n, [&](int64_t j, auto lanes) {
        Vec<S> total(0.0);
        for (int64_t i = 0; i < few; ++i) total += load(x + i * a.channels + j, lanes);
        store(guess.value + j, total * few_share, Full<S>{});
        store(sum.value + j, Vec<S>(0.0), Full<S>{});
        store(sum_squares.value + j, Vec<S>(0.0), Full<S>{});
      });
      for_row_tiles(0, count, [&](int64_t row, auto tile) {
        const T* source = x + row * a.channels;
        step<S>(n, [&](int64_t j, auto lanes) {
          Vec<S> center = load(guess.value + j, Full<S>{});
          Vec<S> s = load(sum.value + j, Full<S>{}), q = load(sum_squares.value + j, Full<S>{});
          for (int i = 0; i < tile.value; ++i) {
            Vec<S> d = load(source + i * a.channels + j, lanes) - center;
            s += d;
            q += d * d;
          }
          store(sum.value + j, s, Full<S>{});
          store(sum_squares.value + j, q, Full<S>{});
        });
      });
      step<S>(n, [&](int64_t j, auto lanes) {
        Vec<S> s = load(sum.value + j, Full<S>{}), q = load(sum_squares.value + j, Full<S>{}) - s * s * share;
        store(mean + j, load(guess.value + j, Full<S>{}) + s * share, lanes);
        store(squares + j, select(q < Vec<S>(0.0), Vec<S>(0.0), q), lanes);
      });
    }
  }
}

template <class S, class T>
void channel_moments(const ChannelMoments& a, int64_t begin, int64_t end) {
  a.planes ? channel_moments_of_planes<S, T>(a, begin, end) : channel_moments_of_rows<S, T>(a, begin, end);
}

}  // namespace ckpt::CKPT_ISA
