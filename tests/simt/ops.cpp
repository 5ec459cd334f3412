// The CUDA operators compiled for the host and its simulated device (cuda/launch.cuh beside this
// file): torch.ops.fdda_simt.* on CPU tensors. One translation unit, under names of its own.

#define fdda fdda_simt

#include "common/stable.h"
#include "cuda/launch.cuh"

#define CUDA CPU

#include "register.cpp"

#include "cuda/class_batch_stats_cuda.cu"
#include "cuda/class_stats_cuda.cu"
#include "cuda/class_stats_loss_cuda.cu"
#include "cuda/fake_quantize_cuda.cu"
#include "cuda/int4_conv2d_cuda.cu"
#include "cuda/int4_program_cuda.cu"
