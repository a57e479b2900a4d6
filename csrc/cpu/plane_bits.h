// Packed bits of planes that are no whole number of bytes (7 x 7), where rows join planes: in memory each plane's bits
// begin with a new byte, in the loops one plane's bits follow on the other's, in a buffer.
#pragma once

#include "grid.h"

namespace brn {
namespace {

class PlaneBits {
 public:
  // Of the planes of a unit. Does nothing where the bits of planes are not apart.
  PlaneBits(const Grid& grid, int64_t unit)
      : grid_(grid),
        unit_(unit),
        planes_(least(grid.unit_channels, grid.channels - unit * grid.unit_channels)),
        joined_(grid.bits_apart ? kRowsOfSums * stride() : 0) {}

  // The bits of rows from `row` on, as the loops see them.
  template <typename Byte>
  BitRowPointer<Byte> of(Byte* bits, int64_t row) const {
    if (!grid_.bits_apart) return Rows{grid_, unit_, row}.bits(bits);
    return {joined_, stride()};
  }

  // Before rows are read: from memory into the buffer.
  void join(const uint8_t* bits, int64_t row, int64_t rows) const {
    if (!grid_.bits_apart) return;
    for (int64_t r = 0; r < rows; ++r) {
      uint8_t* out = joined_ + r * stride();
      uint64_t word = 0;
      int64_t filled = 0;  // bits of the word
      for (int64_t i = 0; i < planes_; ++i) {
        const uint64_t plane = load_bytes(bits + plane_at(row + r, i), plane_bytes()) & lowest_bits(grid_.repeat);
        word |= plane << filled;
        filled += grid_.repeat;
        if (filled < 64) continue;
        memcpy(out, &word, sizeof word);
        out += sizeof word;
        filled -= 64;
        word = filled == 0 ? 0 : plane >> (grid_.repeat - filled);
      }
      memcpy(out, &word, sizeof word);
    }
  }

  // After rows were written: from the buffer into memory, those of the channels that `wanted(i)` picks of the unit.
  template <typename Wanted>
  void part(uint8_t* bits, int64_t row, int64_t rows, Wanted&& wanted) const {
    if (!grid_.bits_apart) return;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < planes_; ++i) {
        if (!wanted(i)) continue;
        const int64_t first = i * grid_.repeat, shift = first % 8;
        uint64_t words[2];
        memcpy(words, joined_ + r * stride() + first / 8, sizeof words);
        const uint64_t beyond = shift == 0 ? 0 : words[1] << (64 - shift);
        const uint64_t plane = (words[0] >> shift | beyond) & lowest_bits(grid_.repeat);
        store_bytes(bits + plane_at(row + r, i), plane, plane_bytes());
      }
    }
  }

 private:
  static_assert(kNarrowPlane <= 64, "a plane's bits are one word");

  int64_t plane_bytes() const { return (grid_.repeat + 7) / 8; }
  int64_t plane_at(int64_t row, int64_t i) const {
    return (row * grid_.channels + unit_ * grid_.unit_channels + i) * plane_bytes();
  }
  // Bytes from row to row of the buffer; two words are read, and one is written, wherever a plane begins.
  int64_t stride() const { return (planes_ * grid_.repeat + 7) / 8 + 16; }

  const Grid& grid_;
  const int64_t unit_, planes_;
  const Scratch<uint8_t> joined_;
};

}  // namespace
}  // namespace brn
