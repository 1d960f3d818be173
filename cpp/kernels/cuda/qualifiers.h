// File: kernels/cuda/qualifiers.h
//
// For the little that is computed by the same lines on the CPU and on a GPU.
#ifndef PYKD_KERNELS_CUDA_QUALIFIERS_H_
#define PYKD_KERNELS_CUDA_QUALIFIERS_H_

#ifdef __CUDACC__
#define PYKD_GPU_AND_HOST __host__ __device__ __forceinline__
#else
#define PYKD_GPU_AND_HOST inline
#endif

#endif  // PYKD_KERNELS_CUDA_QUALIFIERS_H_
