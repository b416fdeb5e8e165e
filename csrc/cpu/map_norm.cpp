// Row norms over the channels of maps, (samples, channels, *space), on the CPU.
//
// In channels_last the channels of a pixel are a row. In contiguous maps each channel of a sample is a plane of pixels:
// tiles of pixels are transposed into scratch that stays in the second-level cache, where the loops of row_norm_rows.h
// compute them, and results are transposed back; an output in planes of an input in planes is computed along the planes
// (map_norm_rows.h). So every map is read from memory and written once, and the numbers are those of rows.
#include "coefficient.h"
#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

// A map in either layout; null if the block does not have the operand.
struct Map {
  char* data = nullptr;
  bool planes = false;
  explicit operator bool() const { return data != nullptr; }
};

// A range of pixels, counted through all samples.
struct Pixels {
  int64_t begin, end;
};

class MapOperands : public Operands<View> {
 public:
  explicit MapOperands(const View& input) : Operands("input", input), element(size_of(kind)) {
    STD_TORCH_CHECK(input.dim() > 2 && input.numel() > 0, "input is no map of (samples, channels, *space)");
    samples_ = input.size(0);
    channels = input.size(1);
    size_ = input.numel() / (samples_ * channels);
  }

  const int64_t element;  // bytes
  int64_t channels;

  int64_t pixels() const { return samples_ * size_; }

  Map map(const char* name, const View& t) const {
    char* data = static_cast<char*>(address(name, t, int64_t(kind)));
    STD_TORCH_CHECK(t.dim() > 2 && t.size(0) == samples_ && t.size(1) == channels && t.numel() == pixels() * channels,
                    name, " has not the input's shape");
    if (is_channels_last(t)) return {data, false};
    STD_TORCH_CHECK(t.is_contiguous(), name, " is neither contiguous nor channels last");
    return {data, true};
  }
  Map map(const char* name, const std::optional<View>& t) const { return t ? map(name, *t) : Map{}; }

  // The pixels of a tile: few enough that three tiles stay in the second-level cache.
  int64_t tile_pixels() const {
    constexpr int64_t least = 16, most = 64, bytes = 64 << 10;
    const int64_t fitting = bytes / (channels * element) / least * least;
    return fitting < least ? least : fitting > most ? most : fitting;
  }

  int64_t tile_bytes() const { return divide_up(tile_pixels() * channels * element, 64) * 64; }

  // Calls body(pixels) for tiles of pixels, each of one sample; once for all pixels if no map is in planes.
  template <class Body>
  void for_tiles(Pixels all, bool planes, const Body& body) const {
    if (!planes) return body(all);
    for (int64_t begin = all.begin; begin < all.end;) {
      int64_t end = begin + tile_pixels();
      const int64_t sample_end = (begin / size_ + 1) * size_;
      if (end > sample_end) end = sample_end;
      if (end > all.end) end = all.end;
      body(Pixels{begin, end});
      begin = end;
    }
  }

  // The channels of a tile of a map in planes.
  Rows planes(const Map& map, Pixels tile) const {
    return {map.data + (tile.begin / size_ * channels * size_ + tile.begin % size_) * element, size_};
  }

  // The rows of a tile of a map: where they lie, or in scratch.
  Rows rows(const Map& map, Pixels tile, char* scratch) const {
    if (!map) return {};
    return {map.planes ? scratch : map.data + tile.begin * channels * element, channels};
  }
  Rows read_rows(const Map& map, Pixels tile, char* scratch) const {
    if (map.planes)
      transpose_loops(kind).transpose(planes(map, tile).data, size_, channels, tile.end - tile.begin, scratch,
                                      channels);
    return rows(map, tile, scratch);
  }
  void write_rows(const Map& map, Pixels tile, const char* scratch) const {
    if (map.planes)
      transpose_loops(kind).transpose(scratch, channels, tile.end - tile.begin, channels, planes(map, tile).data,
                                      size_);
  }

 private:
  static bool is_channels_last(const View& t) {
    int64_t expected = 1;
    for (int64_t i = 0; i < t.dim(); ++i) {
      const int64_t dim = i == 0 ? 1 : i == t.dim() - 1 ? 0 : t.dim() - i;
      if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
      expected *= t.size(dim);
    }
    return true;
  }

  int64_t samples_, size_;
};

// The operands that both passes have. The object owns the coefficients in the compute type.
class MapNorm {
 public:
  MapNorm(const View& input_tensor, const std::optional<View>& weight, const std::optional<View>& bias,
          const std::optional<View>& mean, const View& rstd, double weight_offset)
      : operands(input_tensor),
        input(operands.map("input", input_tensor)),
        weight_(operands, "weight", weight, weight_offset),
        bias_(operands, "bias", bias, 0) {
    whole_.rows = whole_.rows_per_group = operands.pixels();
    whole_.columns = operands.channels;
    whole_.weight = for_columns(weight_, "weight", weight, operands.channels);
    whole_.bias = for_columns(bias_, "bias", bias, operands.channels);
    whole_.mean = operands.numbers("mean", mean, operands.pixels());
    whole_.rstd = operands.numbers("rstd", rstd, operands.pixels());
    whole_.centered = mean.has_value();
  }

  const MapOperands operands;
  const Map input;

  // The block of some pixels, without their rows.
  template <class Block>
  Block block(Pixels pixels, int64_t activation, bool cast_before_weight) const {
    const int64_t offset = pixels.begin * compute_size(operands.kind);
    Block a;
    static_cast<RowNorm&>(a) = whole_;
    a.rows = a.rows_per_group = pixels.end - pixels.begin;
    if (a.centered) a.mean = static_cast<char*>(a.mean) + offset;
    a.rstd = static_cast<char*>(a.rstd) + offset;
    a.activation = int(activation);
    a.cast_before_weight = cast_before_weight;
    return a;
  }

 private:
  const Coefficient weight_, bias_;
  RowNorm whole_;
};

void map_norm_forward(View input, std::optional<View> weight, std::optional<View> bias, std::optional<View> mean,
                      View rstd, View output, double eps, int64_t activation, double weight_offset,
                      bool cast_before_weight, bool given_statistics) {
  const MapNorm norm(input, weight, bias, mean, rstd, weight_offset);
  const MapOperands& operands = norm.operands;
  const Map target = operands.map("output", output);
  const RowNormLoops& loops = row_norm_loops(operands.kind);
  const MapNormLoops& map_loops = map_norm_loops(operands.kind);
  const int64_t pixels = operands.pixels(), unit = operands.tile_pixels(), units = divide_up(pixels, unit);
  const int64_t shares = shares_of(units, grain(operands.channels * unit)), bytes = operands.tile_bytes();
  const bool planes = norm.input.planes || target.planes;
  const Scratch scratch(planes ? shares * 2 * bytes : 0);
  for_shares(units, shares, [&](int64_t share, int64_t begin, int64_t end) {
    char *const read = scratch.data() + share * 2 * bytes, *const written = read + bytes;
    const Pixels all{begin * unit, end * unit < pixels ? end * unit : pixels};
    operands.for_tiles(all, planes, [&](Pixels tile) {
      RowNormForward a = norm.block<RowNormForward>(tile, activation, cast_before_weight);
      a.eps = eps;
      a.given_statistics = given_statistics;
      if (norm.input.planes && target.planes) {
        if (!given_statistics) {
          a.input = operands.read_rows(norm.input, tile, read);
          map_loops.statistics(a);
        }
        return map_loops.output(a, operands.planes(norm.input, tile), operands.planes(target, tile));
      }
      a.input = operands.read_rows(norm.input, tile, read);
      a.output = operands.rows(target, tile, written);
      loops.forward(a, 0, a.rows, nullptr);
      operands.write_rows(target, tile, written);
    });
  });
}

void map_norm_backward(View grad_output, View input, std::optional<View> weight, std::optional<View> bias,
                       std::optional<View> mean, View rstd, std::optional<View> grad_input,
                       std::optional<View> grad_weight, std::optional<View> grad_bias, int64_t activation,
                       double weight_offset, bool cast_before_weight) {
  const MapNorm norm(input, weight, bias, mean, rstd, weight_offset);
  const MapOperands& operands = norm.operands;
  const Map grads = operands.map("grad_output", grad_output), target = operands.map("grad_input", grad_input);
  const RowNormLoops& loops = row_norm_loops(operands.kind);
  const int64_t channels = operands.channels, bytes = operands.tile_bytes();
  const bool planes = norm.input.planes || grads.planes || target.planes;
  const RowTasks tasks(operands.pixels(), operands.pixels(), channels, planes ? operands.tile_pixels() : tile_rows);
  const PartialSums weight_sums(operands.numbers("grad_weight", grad_weight, channels), tasks, channels, operands.kind);
  const PartialSums bias_sums(operands.numbers("grad_bias", grad_bias, channels), tasks, channels, operands.kind);
  const int64_t shares = shares_of(tasks.wave, grain(channels * tasks.task_rows));
  // A tile may have any number of rows, as a group of one row has.
  RowNormBackward least = norm.block<RowNormBackward>({0, 1}, activation, cast_before_weight);
  const int64_t own_bytes = loops.backward_scratch(least) * compute_size(operands.kind);
  const int64_t share_bytes = own_bytes + (planes ? 3 * bytes : 0);
  const Scratch scratch(shares * share_bytes);
  for_tasks(tasks, shares, {&weight_sums, &bias_sums}, [&](int64_t share, int64_t task) {
    char* const own = scratch.data() + share * share_bytes;
    char *const read = own + own_bytes, *const read_grads = read + bytes, *const written = read_grads + bytes;
    void *const sum_weight = weight_sums.of(task), *const sum_bias = bias_sums.of(task);
    operands.for_tiles({tasks.begin(task), tasks.end(task)}, planes, [&](Pixels tile) {
      RowNormBackward a = norm.block<RowNormBackward>(tile, activation, cast_before_weight);
      a.input = operands.read_rows(norm.input, tile, read);
      a.grad_output = operands.read_rows(grads, tile, read_grads);
      a.grad_input = operands.rows(target, tile, written);
      loops.backward(a, 0, a.rows, own, sum_weight, sum_bias);
      operands.write_rows(target, tile, written);
    });
  });
}

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) {
  ckpt::CpuDevice::add<&ckpt::map_norm_forward>(m, "map_norm_forward");
  ckpt::CpuDevice::add<&ckpt::map_norm_backward>(m, "map_norm_backward");
}
