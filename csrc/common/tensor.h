// Tensors of torch as the kernels take them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "common/adapters.cuh"
#include "common/check.h"
#include "common/stream.h"
#include "common/tile.cuh"

namespace fused_lora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

template <typename T>
constexpr ScalarType kDtype = std::is_same_v<T, float>     ? ScalarType::Float
                              : std::is_same_v<T, __half>  ? ScalarType::Half
                              : std::is_same_v<T, int32_t> ? ScalarType::Int
                              : std::is_same_v<T, int64_t> ? ScalarType::Long
                              : std::is_same_v<T, uint8_t> ? ScalarType::Byte
                                                           : ScalarType::BFloat16;

// fn(T{}) for the dtype that the kernels have.
template <typename Fn>
void for_dtype(ScalarType dtype, const char* op, const Fn& fn) {
  switch (dtype) {
    case ScalarType::Float:
      return fn(float{});
    case ScalarType::Half:
      return fn(__half{});
    case ScalarType::BFloat16:
      return fn(__nv_bfloat16{});
    default:
      check(false, op, ": the dtype must be float32, float16 or bfloat16");
  }
}

// What all tensors of one call are held to.
struct Call {
  const char* op;
  int32_t device;

  // `sizes` of -1 may be any.
  template <typename T>
  void expect(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) const {
    bool fits = t.scalar_type() == kDtype<T> && t.dim() == int64_t(sizes.size());
    int64_t i = 0;
    for (const int64_t size : sizes) {
      fits = fits && (size < 0 || t.size(i) == size);
      ++i;
    }
    check(fits, op, ": ", name, " has another dtype or shape than this call wants");
    check(t.get_device_index() == device, op, ": ", name, " is on another device");
  }

  // The data of a tensor of which index arithmetic assumes that it is contiguous.
  template <typename T>
  T* data(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) const {
    expect<T>(name, t, sizes);
    check(t.is_contiguous(), op, ": ", name, " must be contiguous");
    return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
  }
  template <typename T>
  T* data(const char* name, const MaybeTensor& t, std::initializer_list<int64_t> sizes) const {
    return t.has_value() ? data<T>(name, *t, sizes) : nullptr;
  }

  template <typename T>
  bool chunked(const T* data, int64_t row_stride, int64_t col_stride) const {
    return col_stride == 1 && row_stride % kChunk<T> == 0 &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  // The last two dimensions of a tensor, of its first slot where there are three.
  template <typename T>
  Matrix<T> matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
    if (t.dim() == 3) {
      expect<T>(name, t, {-1, rows, cols});
    } else {
      expect<T>(name, t, {rows, cols});
    }
    const int64_t d = t.dim() - 2;
    const T* data = static_cast<const T*>(t.const_data_ptr());
    const int64_t row_stride = t.size(d) > 1 ? t.stride(d) : 0;
    const int64_t col_stride = t.size(d + 1) > 1 ? t.stride(d + 1) : 1;
    bool fits = chunked(data, row_stride, col_stride);
    if (t.dim() == 3) fits = fits && t.stride(0) % kChunk<T> == 0;
    return {data, t.size(d), t.size(d + 1), row_stride, col_stride, fits};
  }

  // table, rank, scale, ids, order and offsets of many adapters, or none of them for one.
  Adapters adapters(const Tensors& many, const MaybeTensor& gate, int64_t M, int64_t R,
                    double scale) const {
    Adapters a = {};
    a.G = 1;
    a.R = a.one_rank = int(R);
    a.one_scale = float(scale);
    check(R > 0 && R < (int64_t(1) << 31), op, ": the rank must be at least 1");
    if (many.empty()) {
      a.gate = data<float>("gate", gate, {R});
      return a;
    }
    check(many.size() == 6, op, ": adapters must be table, rank, scale, ids, order, offsets");
    const int64_t G = many[0].size(0), P = many[1].size(0);
    a.table = data<int32_t>("table", many[0], {G});
    a.rank = data<int32_t>("rank", many[1], {P});
    a.scale = data<float>("scale", many[2], {P});
    a.gate = data<float>("gate", gate, {P, R});
    a.ids = data<int32_t>("ids", many[3], {M});
    a.order = data<int32_t>("order", many[4], {M});
    a.offsets = data<int32_t>("offsets", many[5], {G + 1});
    a.G = int(G);
    return a;
  }

  Dropout dropout(const MaybeTensor& seed, int64_t threshold, double keep_scale, int64_t first_call,
                  int64_t row_calls) const {
    return {data<int64_t>("seed", seed, {1}), uint32_t(threshold), float(keep_scale), first_call,
            row_calls};
  }
};

}  // namespace fused_lora
