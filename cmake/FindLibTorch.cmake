# Finds LibTorch as pykd needs it: headers and the three libraries that the C++ interface lives in.
# It stands in for LibTorch's own find_package(Torch), which also demands the CUDA toolkit of a CUDA
# build and links its libraries: pykd calls CUDA through LibTorch alone, so one libpykd_torch serves
# the CPU and the CUDA builds of one release.
#
# Looked for in CMAKE_PREFIX_PATH (a LibTorch folder, or torch.utils.cmake_prefix_path) and Torch_DIR,
# then in LibTorch_BESIDE, then in the Python that CMake finds. Sets LibTorch_VERSION and LibTorch_LIBRARY_DIR and defines the
# target LibTorch::LibTorch.
set(_hints "")
if(Torch_DIR)
  list(APPEND _hints "${Torch_DIR}/../../..")
endif()
find_path(LibTorch_INCLUDE_DIR torch/script.h HINTS ${_hints} PATH_SUFFIXES include ../../include)
if(NOT LibTorch_INCLUDE_DIR AND LibTorch_BESIDE)
  find_path(LibTorch_INCLUDE_DIR torch/script.h PATHS "${LibTorch_BESIDE}" PATH_SUFFIXES include NO_DEFAULT_PATH)
endif()
if(NOT LibTorch_INCLUDE_DIR)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
              "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0], end='')"
      OUTPUT_VARIABLE _hints RESULT_VARIABLE _failed ERROR_QUIET)
    if(NOT _failed)
      find_path(LibTorch_INCLUDE_DIR torch/script.h HINTS "${_hints}" PATH_SUFFIXES include)
    endif()
  endif()
endif()

if(LibTorch_INCLUDE_DIR)
  set(_version "")
  foreach(_header torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(EXISTS "${LibTorch_INCLUDE_DIR}/${_header}" AND NOT _version)
      file(STRINGS "${LibTorch_INCLUDE_DIR}/${_header}" _lines
           REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
      string(REGEX REPLACE "[^0-9;]" "" _version "${_lines}")
      string(REPLACE ";" "." _version "${_version}")
    endif()
  endforeach()
  set(LibTorch_VERSION "${_version}")
  foreach(_name torch torch_cpu c10)
    find_library(LibTorch_${_name}_LIBRARY ${_name} HINTS "${LibTorch_INCLUDE_DIR}/../lib"
                 NO_DEFAULT_PATH)
  endforeach()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  LibTorch
  REQUIRED_VARS LibTorch_INCLUDE_DIR LibTorch_torch_LIBRARY LibTorch_torch_cpu_LIBRARY
                LibTorch_c10_LIBRARY
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE
    "name it with -DCMAKE_PREFIX_PATH=$(python -c 'print(__import__(\"torch\").utils.cmake_prefix_path)'), or build without the TorchScript engine: -DPYKD_TORCH=OFF")

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  get_filename_component(LibTorch_LIBRARY_DIR "${LibTorch_torch_cpu_LIBRARY}" DIRECTORY)
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  # libtorch.so holds no code, but it brings libtorch_cuda.so along where there is one: keep it.
  set_target_properties(
    LibTorch::LibTorch
    PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES
      "${LibTorch_INCLUDE_DIR};${LibTorch_INCLUDE_DIR}/torch/csrc/api/include"
      INTERFACE_COMPILE_FEATURES cxx_std_20
      INTERFACE_LINK_LIBRARIES
      "-Wl,--push-state,--no-as-needed,${LibTorch_torch_LIBRARY},--pop-state;${LibTorch_torch_cpu_LIBRARY};${LibTorch_c10_LIBRARY}"
  )
endif()
mark_as_advanced(LibTorch_INCLUDE_DIR LibTorch_torch_LIBRARY LibTorch_torch_cpu_LIBRARY
                 LibTorch_c10_LIBRARY)
unset(_hints)
unset(_version)
