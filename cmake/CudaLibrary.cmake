# libpykd_cuda: the kernels for CUDA, opened on demand by libpykd (cpp/kernels/cuda/loader.h). Included by
# cpp/CMakeLists.txt. PYKD_CUDA=AUTO builds it where nvcc of CUDA 12 or later is found, which needs no GPU. The CUDA
# runtime is linked into it, so that it loads on machines without CUDA too, and then says why it cannot be used.
#
# Machine code for the compute capabilities 8.0 (it runs on 8.6 and 8.9 too), 9.0 and 10.0, and PTX of the newest, which
# the driver compiles for later devices. CUDA before 12.8 does not know 10.0. Others: -DCMAKE_CUDA_ARCHITECTURES=...
if(NOT PYKD_CUDA)
  return()
endif()

include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  # Where CUDA installs itself, for those whose PATH does not say so.
  find_program(PYKD_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  mark_as_advanced(PYKD_NVCC)
  if(PYKD_NVCC)
    set(CMAKE_CUDA_COMPILER "${PYKD_NVCC}")
  endif()
endif()
set(_pykd_nvcc "${CMAKE_CUDA_COMPILER}")
if(NOT _pykd_nvcc)
  check_language(CUDA)
endif()
set(_pykd_why_not "no nvcc that works")
if(CMAKE_CUDA_COMPILER)
  set(_pykd_why_not "")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES OFF)  # chosen below, once the version is known
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
    set(_pykd_why_not "CUDA ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
endif()
if(_pykd_why_not)
  if(NOT PYKD_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "PYKD_CUDA=${PYKD_CUDA} needs nvcc of CUDA 12 or later, got ${_pykd_why_not}; set CUDACXX "
                        "to it, or PYKD_CUDA=OFF")
  endif()
  message(STATUS "libpykd_cuda: not built (${_pykd_why_not})")
  return()
endif()

set(_pykd_architectures "${CMAKE_CUDA_ARCHITECTURES}")
if(NOT _pykd_architectures)
  set(_pykd_architectures 80-real 90)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(_pykd_architectures 80-real 90-real 100)
  endif()
endif()
# The oldest of them, for the library's own "this device is too old".
set(_pykd_oldest 1000)
foreach(_architecture IN LISTS _pykd_architectures)
  string(REGEX MATCH "^[0-9]+" _number "${_architecture}")
  if(_number AND _number LESS _pykd_oldest)
    set(_pykd_oldest ${_number})
  endif()
endforeach()
if(_pykd_oldest EQUAL 1000)  # "all", "native": no numbers
  set(_pykd_oldest 80)
endif()

file(GLOB PYKD_CUDA_SOURCES CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cpp/kernels/*/*.cu")
add_library(pykd_cuda SHARED ${PYKD_CUDA_SOURCES})
target_compile_definitions(pykd_cuda PRIVATE PYKD_BUILD PYKD_CUDA_OLDEST=${_pykd_oldest})
target_include_directories(pykd_cuda PRIVATE "${PROJECT_SOURCE_DIR}/cpp" "${PROJECT_SOURCE_DIR}/cpp/include")
target_compile_options(pykd_cuda PRIVATE $<$<BOOL:${PYKD_WERROR}>:-Werror=all-warnings>
                                         "SHELL:-Xcompiler=-Wall,-Wextra,-Wno-unused-parameter")
set_target_properties(pykd_cuda PROPERTIES
                      CUDA_ARCHITECTURES "${_pykd_architectures}"
                      CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
                      CUDA_RUNTIME_LIBRARY Static
                      CUDA_VISIBILITY_PRESET hidden)
# It exports two functions.
set(_pykd_map "${PROJECT_SOURCE_DIR}/cpp/kernels/cuda/libpykd_cuda.map")
target_link_options(pykd_cuda PRIVATE "-Wl,--version-script=${_pykd_map}" -Wl,-z,defs)
set_target_properties(pykd_cuda PROPERTIES LINK_DEPENDS "${_pykd_map}")
list(JOIN _pykd_architectures " " _pykd_architectures)
message(STATUS "libpykd_cuda: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, for ${_pykd_architectures}")
