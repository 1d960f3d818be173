# Finds Highway, with which the CPU kernels are written (Debian: libhwy-dev; conda-forge: libhwy; vcpkg: highway).
#
# It looks for one header and one library, because that is all pykd needs of it; the package's own hwy-config.cmake
# also demands the parts that pykd does not use. Sets Highway_VERSION and defines the target Highway::Highway. In
# Highway_SHARED_LIBRARY is the file of a shared one, which travels in the wheel, and in Highway_LICENSE its terms,
# where they were found.
find_path(Highway_INCLUDE_DIR hwy/highway.h DOC "Highway's headers (Debian: libhwy-dev)")
find_library(Highway_LIBRARY NAMES hwy libhwy.so.1 DOC "Highway's library (Debian: libhwy-dev)")
find_file(Highway_LICENSE NAMES libhwy1/copyright libhwy-dev/copyright highway/copyright
          PATH_SUFFIXES share/doc share NO_CACHE)

if(Highway_INCLUDE_DIR)
  set(Highway_VERSION "")
  foreach(_header highway.h base.h)
    file(STRINGS "${Highway_INCLUDE_DIR}/hwy/${_header}" _lines REGEX "^#define HWY_(MAJOR|MINOR|PATCH) [0-9]+")
    if(_lines AND NOT Highway_VERSION)
      string(REGEX REPLACE "[^0-9;]" "" Highway_VERSION "${_lines}")
      string(REPLACE ";" "." Highway_VERSION "${Highway_VERSION}")
    endif()
  endforeach()
  unset(_header)
  unset(_lines)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  Highway
  REQUIRED_VARS Highway_LIBRARY Highway_INCLUDE_DIR
  VERSION_VAR Highway_VERSION
  REASON_FAILURE_MESSAGE "run scripts/bootstrap, or install it and name its prefix in CMAKE_PREFIX_PATH")

set(Highway_SHARED_LIBRARY "")
if(Highway_FOUND)
  get_filename_component(_file "${Highway_LIBRARY}" REALPATH)
  if(_file MATCHES "\\.so")
    set(Highway_SHARED_LIBRARY "${_file}")
  endif()
  unset(_file)
  if(NOT TARGET Highway::Highway)
    add_library(Highway::Highway UNKNOWN IMPORTED)
    set_target_properties(Highway::Highway PROPERTIES
                          IMPORTED_LOCATION "${Highway_LIBRARY}"
                          INTERFACE_INCLUDE_DIRECTORIES "${Highway_INCLUDE_DIR}")
    if(Highway_SHARED_LIBRARY)
      set_property(TARGET Highway::Highway PROPERTY INTERFACE_COMPILE_DEFINITIONS HWY_SHARED_DEFINE)
    endif()
  endif()
endif()
mark_as_advanced(Highway_INCLUDE_DIR Highway_LIBRARY)
