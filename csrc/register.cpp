// Schemas of all operators of torch.ops.fdda. The implementations register themselves at the end of
// csrc/cpu/*_cpu.cpp and csrc/cuda/*_cuda.cu. fdda_ext/ops adds fake kernels and autograd. A
// leading underscore marks a private operator: a backward pass, or a part of the integer programs.

#include "common/stable.h"

STABLE_TORCH_LIBRARY(fdda, m) {
  // x [*] float32, bfloat16 or float16; scale, zero_point float32 [] or [1], or [x.size(axis)].
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
      "int? axis=None) -> Tensor");
  m.def(
      "_fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, "
      "int quant_min, int quant_max, int? axis=None) "
      "-> (Tensor grad_x, Tensor grad_scale, Tensor grad_zero_point)");

  // x [N, C, *], labels int64 [N] -> count int64 [K], mean [K, C], var [K, C].
  m.def(
      "class_batch_stats(Tensor x, Tensor labels, int num_classes) "
      "-> (Tensor count, Tensor mean, Tensor var)");
  m.def(
      "_class_batch_stats_backward(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor labels, "
      "Tensor count, Tensor mean) -> Tensor");

  // xs: L tensors [N, C_l, *]; targets: L tensors [T, K, C_l]; weight [T, K] -> loss [T, L] and
  // statistics [2, K, sum C_l] for the backward pass (mean, then var; layers side by side).
  m.def(
      "class_stats_loss(Tensor[] xs, Tensor labels, Tensor[] target_means, Tensor[] target_vars, "
      "Tensor weight) -> (Tensor loss, Tensor statistics)");
  m.def(
      "_class_stats_loss_backward(Tensor grad_loss, Tensor[] xs, Tensor labels, "
      "Tensor[] target_means, Tensor[] target_vars, Tensor weight, Tensor statistics) "
      "-> Tensor[]");

  // weight int8 [O, kh, kw, C / groups] -> int8 [*], in the layout of int4_conv2d on its device.
  m.def("int4_pack_weight(Tensor weight, int groups, bool winograd=False) -> Tensor");
  // x uint8 [N, H, W, C]; weight packed; scale, shift float32 [O]; correction int32 [O]; residual
  // uint8 or float32 [N, H', W', O] -> [N, H', W', O]: uint8 codes, or float32 if out_bits is 0.
  m.def(
      "int4_conv2d(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor correction, "
      "Tensor? residual, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
      "int zero_point, float low, float high, float residual_scale, int residual_zero_point, "
      "float out_scale, int out_zero_point, int out_bits, int bits=8, bool winograd=False) -> "
      "Tensor");
  // images float32 [N, C, H, W], or uint8 with table [C * 256] -> codes uint8 [N, H, W, C].
  m.def(
      "_int4_image_codes(Tensor images, Tensor? table, float inverse_scale, int zero_point, "
      "int quant_max) -> Tensor");
  // x uint8 [N, H, W, C] -> largest code of each window, uint8 [N, size[0], size[1], C]. This and
  // _int4_image_codes are for CUDA only.
  m.def(
      "_int4_max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "int[] size) -> Tensor");
  // images float32 or uint8 [N, C, H, W]; constants, workspace uint8; records int64 (described in
  // int4_program_cpu.cpp) -> the result [N, H, W, C]. nanoseconds int64 receives the time of every
  // instruction. CPU only.
  m.def(
      "_int4_program(Tensor images, Tensor constants, Tensor records, Tensor(a!) workspace, "
      "Tensor(b!)? nanoseconds=None) -> Tensor");
}
