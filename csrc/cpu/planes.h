// The contiguous layout: a unit is a channel, an item a piece of one of its planes, and coefficients are one value.
#pragma once

#include "elementwise.h"
#include "plan.h"

namespace brn {
namespace {

constexpr int64_t kPieceElements = 16384;  // of a plane; a multiple of every group
constexpr int64_t kAhead = 1024;           // elements between what is read and what is prefetched
constexpr int64_t kRunPieces = 64;
constexpr int64_t kSplitElements = 1 << 18;

// Where item `i` of a channel lies.
struct Pieces {
  Layout layout;
  int64_t in_plane;  // pieces of a plane

  explicit Pieces(const Layout& of) : layout(of), in_plane(ceil_div(of.inner, kPieceElements)) {}

  int64_t items() const { return layout.outer * in_plane; }
  int64_t length(int64_t i) const { return least(kPieceElements, layout.inner - i % in_plane * kPieceElements); }
  // Pieces that are summed in the arithmetic's dtype; beyond that, sums are double.
  int64_t run() const { return most(1, least(kRunPieces, kPieceElements / layout.inner)); }
  int64_t elements(int64_t first, int64_t end) const {
    int64_t sum = 0;
    for (int64_t i = first; i < end; ++i) sum += length(i);
    return sum;
  }
  template <typename S>
  S* at(const Side& side, int64_t channel, int64_t i) const {
    if (side.data == nullptr) return nullptr;
    return static_cast<S*>(side.data) + i / in_plane * side.outer_stride + channel * side.channel_stride +
           i % in_plane * kPieceElements;
  }
  template <typename Byte>
  Byte* bits_at(Byte* bits, int64_t channel, int64_t i) const {
    if (bits == nullptr) return nullptr;
    const int64_t row = i / in_plane * layout.channels + channel;
    return bits + row * ((layout.inner + 7) / 8) + i % in_plane * (kPieceElements / 8);
  }
  Plan plan(int tensors, int64_t itemsize, const Parallel& parallel) const {
    const bool fits_cache = layout.outer * layout.inner * tensors * itemsize <= parallel.cache_bytes;
    const int64_t piece = least(layout.inner, kPieceElements);
    return plan_of(layout.channels, 1, items(), piece, most(1, kSplitElements / piece), fits_cache, parallel);
  }
};

template <typename S, Activation ACTIVATION>
class ForwardPlanes {
  using A = Accumulate<S>;

 public:
  ForwardPlanes(const ForwardArguments& arguments, const Parallel& parallel)
      : a_(arguments),
        pieces_(arguments.layout),
        limits_(limits_of_all<A>(arguments)),
        plan_(pieces_.plan(2, sizeof(S), parallel)),
        past_cache_(goes_past_cache(parallel, arguments.layout, sizeof(S))),
        partials_(plan_.units * plan_.splits),
        coefficients_(plan_.units),
        written_(plan_.units) {
    for (int64_t channel = 0; channel < plan_.units; ++channel) {
      written_[channel] = predicted_unclipped(a_, channel, limits_);
      if (a_.given) coefficients_[channel] = given_coefficients<A>(a_, channel);
    }
  }

  const Plan& plan() const { return plan_; }
  bool given() const { return a_.given; }
  bool needs_second(int64_t channel) const { return !written_[channel]; }

  void first(int64_t channel, int64_t split) {
    const int64_t first = split * plan_.per_split, end = least(first + plan_.per_split, plan_.items);
    const bool speculates = written_[channel];
    const Coefficients<A> c = speculates ? predicted_coefficients<A>(a_, channel) : Coefficients<A>{};
    A origin = mean_of_start(pieces_.template at<const S>(a_.x, channel, first), pieces_.length(first));
    Moments moments = {};
    for (int64_t begin = first; begin < end; begin += pieces_.run()) {
      const int64_t stop = least(begin + pieces_.run(), end);
      Sums<A> sums = no_sums<A>();
      for (int64_t i = begin; i < stop; ++i) {
        if (speculates) {
          row<true, true>(channel, i, origin, c, sums);
        } else {
          row<true, false>(channel, i, origin, c, sums);
        }
      }
      const double count = static_cast<double>(pieces_.elements(begin, stop));
      const Moments more = moments_of(count, origin, total(sums.s1), total(sums.s2));
      moments = begin == first ? more : merged(moments, more);
      origin = static_cast<A>(moments.mean);  // nearer to the mean of what follows
    }
    partials_[channel * plan_.splits + split] = moments;
  }

  void finish(int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      const Moments* partials = partials_ + channel * plan_.splits;
      Moments moments = partials[0];
      for (int64_t split = 1; split < plan_.splits; ++split) moments = merged(moments, partials[split]);
      const Correction<A> correction = finish_channel(a_, channel, moments, limits_);
      coefficients_[channel] = correction.coefficients;
      written_[channel] = written_[channel] && !correction.applies;
    }
  }

  void second(int64_t channel, int64_t split) {
    const int64_t first = split * plan_.per_split, end = least(first + plan_.per_split, plan_.items);
    Sums<A> unused;
    for (int64_t i = end - 1; i >= first; --i) row<false, true>(channel, i, 0, coefficients_[channel], unused);
  }

 private:
  A mean_of_start(const S* x, int64_t length) const {
    const int64_t count = least(length, 1024);
    Group<A> sum = everywhere<A>(0);
    for_each_group<A>(count, [&](auto size, int64_t i, int64_t n) BRN_LAMBDA { sum = sum + load(size, x + i, n); });
    return static_cast<A>(total(sum) / static_cast<double>(count));
  }

  template <bool GATHER, bool WRITE>
  void row(int64_t channel, int64_t i, A origin, const Coefficients<A>& c, Sums<A>& sums) const {
    if (WRITE && (a_.residual.data != nullptr || a_.bits != nullptr)) {
      row<GATHER, WRITE, true>(channel, i, origin, c, sums);
    } else {
      row<GATHER, WRITE, false>(channel, i, origin, c, sums);
    }
  }

  template <bool GATHER, bool WRITE, bool EXTRAS>
  void row(int64_t channel, int64_t i, A origin, const Coefficients<A>& c, Sums<A>& sums) const {
    const S* x = pieces_.template at<const S>(a_.x, channel, i);
    const S* residual = pieces_.template at<const S>(a_.residual, channel, i);
    S* y = pieces_.template at<S>(a_.y, channel, i);
    uint8_t* bits = pieces_.bits_at(a_.bits, channel, i);
    const Group<A> origins = everywhere(origin);
    const GroupCoefficients<A> all = {everywhere(c.pivot), everywhere(c.scale), everywhere(c.shift)};
    Sums<A> local = no_sums<A>();
    for_each_group<A>(pieces_.length(i), [&](auto size, int64_t at, int64_t n) BRN_LAMBDA {
      prefetch(x + at + kAhead);
      const Group<A> values = load(size, x + at, n);
      if constexpr (GATHER) gather(size, local, values, origins, n);
      if constexpr (WRITE) {
        if (!past_cache_) prefetch<true>(y + at + kAhead);
        write<ACTIVATION, EXTRAS>(size, values, all, offset(residual, at), y + at, offset(bits, at / 8), past_cache_,
                                  n);
      }
    });
    if constexpr (GATHER) add(sums, local);
  }

  const ForwardArguments& a_;
  const Pieces pieces_;
  const Limits<A> limits_;
  const Plan plan_;
  const bool past_cache_;
  Scratch<Moments> partials_;
  Scratch<Coefficients<A>> coefficients_;
  Scratch<bool> written_;
};

template <typename S, Activation ACTIVATION>
class BackwardPlanes {
  using A = Accumulate<S>;

 public:
  BackwardPlanes(const BackwardArguments& arguments, const Parallel& parallel)
      : a_(arguments),
        pieces_(arguments.layout),
        plan_(pieces_.plan(3, sizeof(S), parallel)),
        past_cache_(goes_past_cache(parallel, arguments.layout, sizeof(S))),
        partials_(2 * plan_.units * plan_.splits),
        coefficients_(plan_.units) {}

  const Plan& plan() const { return plan_; }
  bool given() const { return false; }
  bool needs_second(int64_t) const { return a_.dx.data != nullptr || a_.dresidual.data != nullptr; }

  void first(int64_t channel, int64_t split) {
    const int64_t first = split * plan_.per_split, end = least(first + plan_.per_split, plan_.items);
    const BackwardCoefficients<A> c = backward_coefficients<A>(a_, channel);
    double* partial = partials_ + 2 * (channel * plan_.splits + split);
    partial[0] = partial[1] = 0;
    for (int64_t begin = first; begin < end; begin += pieces_.run()) {
      Sums<A> sums = no_sums<A>();
      for (int64_t i = begin; i < least(begin + pieces_.run(), end); ++i) row<false>(channel, i, c, sums);
      partial[0] += total(sums.s1);
      partial[1] += total(sums.s2);
    }
  }

  void finish(int64_t begin, int64_t end) {
    const double count = static_cast<double>(a_.layout.outer * a_.layout.inner);
    for (int64_t channel = begin; channel < end; ++channel) {
      double s1 = 0, s2 = 0;
      for (int64_t split = 0; split < plan_.splits; ++split) {
        s1 += partials_[2 * (channel * plan_.splits + split)];
        s2 += partials_[2 * (channel * plan_.splits + split) + 1];
      }
      coefficients_[channel] = finish_backward_channel<A>(a_, channel, count, s1, s2);
    }
  }

  void second(int64_t channel, int64_t split) {
    const int64_t first = split * plan_.per_split, end = least(first + plan_.per_split, plan_.items);
    Sums<A> unused;
    for (int64_t i = end - 1; i >= first; --i) row<true>(channel, i, coefficients_[channel], unused);
  }

 private:
  template <bool APPLY>
  void row(int64_t channel, int64_t i, const BackwardCoefficients<A>& c, Sums<A>& sums) const {
    const bool only_dx = a_.dx.data != nullptr && a_.dresidual.data == nullptr;
    if (a_.residual.data != nullptr || a_.bits != nullptr || (APPLY && !only_dx)) {
      row<APPLY, true>(channel, i, c, sums);
    } else {
      row<APPLY, false>(channel, i, c, sums);
    }
  }

  template <bool APPLY, bool EXTRAS>
  void row(int64_t channel, int64_t i, const BackwardCoefficients<A>& c, Sums<A>& sums) const {
    const S* dy = pieces_.template at<const S>(a_.dy, channel, i);
    const S* x = pieces_.template at<const S>(a_.x, channel, i);
    const S* residual = pieces_.template at<const S>(a_.residual, channel, i);
    S* dx = pieces_.template at<S>(a_.dx, channel, i);
    S* dresidual = pieces_.template at<S>(a_.dresidual, channel, i);
    const uint8_t* bits = pieces_.bits_at(a_.bits, channel, i);
    const Group<A> mean = everywhere(c.mean), z_scale = everywhere(c.z_scale), z_shift = everywhere(c.z_shift);
    const GroupGradient<A> gradient = {everywhere(c.dx_of_g), everywhere(c.dx_of_x), everywhere(c.dx_shift)};
    Sums<A> local = no_sums<A>();
    for_each_group<A>(pieces_.length(i), [&](auto size, int64_t at, int64_t n) BRN_LAMBDA {
      prefetch(dy + at + kAhead);
      prefetch(x + at + kAhead);
      const Upstream<A> up = upstream<ACTIVATION, EXTRAS>(size, dy + at, x + at, offset(residual, at),
                                                          offset(bits, at / 8), mean, z_scale, z_shift, n);
      if constexpr (APPLY) {
        if (!EXTRAS && !past_cache_) prefetch<true>(dx + at + kAhead);
        write_gradients<EXTRAS>(size, up, gradient, offset(dx, at), offset(dresidual, at), past_cache_, n);
      } else {
        gather(size, local, up, n);
      }
    });
    if constexpr (!APPLY) add(sums, local);
  }

  const BackwardArguments& a_;
  const Pieces pieces_;
  const Plan plan_;
  const bool past_cache_;
  Scratch<double> partials_;
  Scratch<BackwardCoefficients<A>> coefficients_;
};

}  // namespace
}  // namespace brn
