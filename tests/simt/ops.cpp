// The CUDA operators, compiled for the simulated device (cuda/launch.cuh) as one translation unit:
// torch.ops.fdda_simt.* on CPU tensors.

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
