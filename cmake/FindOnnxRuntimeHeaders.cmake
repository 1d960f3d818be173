# Finds ONNX Runtime's C API header. pykd opens the library at run time, so none is linked here.
#
# Looked for, in this order:
#   1. PYKD_ORT_INCLUDE_DIR or ONNXRUNTIME_INCLUDE_DIR (CMake variable, then environment variable)
#   2. ORT_HOME (the unpacked release), CONDA_PREFIX
#   3. CMAKE_PREFIX_PATH (vcpkg, conda) and the system
#   4. .cache/onnxruntime-headers of this tree, which scripts/fetch-onnxruntime-headers fills
#
# Sets ONNXRUNTIME_INCLUDE_DIR, the folder that holds onnxruntime_c_api.h, and
# OnnxRuntimeHeaders_VERSION, its ORT_API_VERSION (21 belongs to release 1.21).
set(_minimum 21)

function(_pykd_ort_api_version folder result)
  file(STRINGS "${folder}/onnxruntime_c_api.h" _line REGEX "^#define ORT_API_VERSION [0-9]+")
  string(REGEX MATCH "[0-9]+" _version "${_line}")
  set(${result} "${_version}" PARENT_SCOPE)
endfunction()

# Older headers are passed over, and remembered for the message.
function(_pykd_ort_new_enough result _folder)
  _pykd_ort_api_version("${_folder}" _version)
  if(NOT _version OR _version LESS 21)
    set_property(GLOBAL PROPERTY PYKD_ORT_TOO_OLD
                 "Those in ${_folder} have ORT_API_VERSION ${_version}. ")
    set(${result} FALSE PARENT_SCOPE)
  endif()
endfunction()
set_property(GLOBAL PROPERTY PYKD_ORT_TOO_OLD "")

# A folder that was named is the one, or an error: never a quiet fallback.
set(_named "")
foreach(_variable PYKD_ORT_INCLUDE_DIR ONNXRUNTIME_INCLUDE_DIR)
  if(NOT _named AND ${_variable})
    set(_named "${${_variable}}")
  endif()
endforeach()
foreach(_variable PYKD_ORT_INCLUDE_DIR ONNXRUNTIME_INCLUDE_DIR)
  if(NOT _named AND NOT "$ENV{${_variable}}" STREQUAL "")
    set(_named "$ENV{${_variable}}")
  endif()
endforeach()
set(_suffixes onnxruntime onnxruntime/core/session include include/onnxruntime
              include/onnxruntime/core/session)
if(_named)
  unset(ONNXRUNTIME_INCLUDE_DIR)
  unset(ONNXRUNTIME_INCLUDE_DIR CACHE)
  find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h PATHS "${_named}"
            PATH_SUFFIXES ${_suffixes} NO_DEFAULT_PATH VALIDATOR _pykd_ort_new_enough)
else()
  find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h
            HINTS "$ENV{ORT_HOME}" "$ENV{CONDA_PREFIX}"
            PATHS "${CMAKE_CURRENT_LIST_DIR}/../.cache/onnxruntime-headers"
            PATH_SUFFIXES ${_suffixes} VALIDATOR _pykd_ort_new_enough)
endif()
if(ONNXRUNTIME_INCLUDE_DIR)
  _pykd_ort_api_version("${ONNXRUNTIME_INCLUDE_DIR}" OnnxRuntimeHeaders_VERSION)
endif()

get_property(_reason GLOBAL PROPERTY PYKD_ORT_TOO_OLD)
if(_named AND NOT _reason)
  set(_reason "There is no onnxruntime_c_api.h in ${_named}. ")
endif()
string(CONCAT _reason
       "expected the C headers of ONNX Runtime 1.${_minimum} or newer. ${_reason}"
       "Run scripts/fetch-onnxruntime-headers (Debian), or install them (Debian 13: libonnxruntime-dev, "
       "conda-forge: onnxruntime-cpp, vcpkg: onnxruntime), or unpack a release of ONNX Runtime, and "
       "name the folder that holds them: -DPYKD_ORT_INCLUDE_DIR=<folder>")

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  OnnxRuntimeHeaders
  REQUIRED_VARS ONNXRUNTIME_INCLUDE_DIR
  VERSION_VAR OnnxRuntimeHeaders_VERSION
  REASON_FAILURE_MESSAGE "${_reason}")
mark_as_advanced(ONNXRUNTIME_INCLUDE_DIR)
unset(_minimum)
unset(_named)
unset(_suffixes)
unset(_reason)
