# What is installed, and how find_package(pykd) finds it: from a prefix, from a wheel, and from this build.
#
# In a wheel (scikit-build-core) everything lies in site-packages/pykd: _core…so, include/, lib/. Wheels cannot
# hold links, so there the libraries carry no version in their names.
include(CMakePackageConfigHelpers)

if(SKBUILD)
  set(CMAKE_INSTALL_LIBDIR lib)
  set(CMAKE_INSTALL_INCLUDEDIR include)
else()
  file(STRINGS cpp/include/pykd/pykd.h _abi REGEX "^#define PYKD_ABI_VERSION [0-9]+")
  string(REGEX MATCH "[0-9]+" _abi "${_abi}")
  set_target_properties(pykd PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${_abi})
endif()
set(_package ${CMAKE_INSTALL_LIBDIR}/cmake/pykd)

install(TARGETS pykd EXPORT pykdTargets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT sdk
        INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(TARGET pykd_torch)  # opened at run time by libpykd, so no target is exported for it
  install(TARGETS pykd_torch LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT sdk)
endif()
if(TARGET pykd_cuda)  # opened at run time by libpykd, too
  install(TARGETS pykd_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT sdk)
endif()
find_package(Highway 1.0 REQUIRED QUIET)  # for its files; cpp/ has found it before
if(SKBUILD AND Highway_SHARED_LIBRARY)  # a wheel brings what it needs along
  get_filename_component(_soname "${Highway_SHARED_LIBRARY}" NAME)
  string(REGEX REPLACE "(\\.so\\.[0-9]+).*" "\\1" _soname "${_soname}")
  install(FILES "${Highway_SHARED_LIBRARY}" DESTINATION ${CMAKE_INSTALL_LIBDIR} RENAME ${_soname}
          PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE
          COMPONENT sdk)
  if(Highway_LICENSE)
    install(FILES "${Highway_LICENSE}" DESTINATION ${CMAKE_INSTALL_LIBDIR} RENAME libhwy.copyright COMPONENT sdk)
  endif()
endif()
install(DIRECTORY cpp/include/pykd DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT sdk)
if(TARGET _core AND SKBUILD)
  install(TARGETS _core LIBRARY DESTINATION . COMPONENT python)
endif()

write_basic_package_version_file("${PROJECT_BINARY_DIR}/pykdConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
configure_package_config_file(cmake/pykdConfig.cmake.in "${PROJECT_BINARY_DIR}/pykdConfig.cmake"
                              INSTALL_DESTINATION ${_package} NO_SET_AND_CHECK_MACRO)
install(FILES "${PROJECT_BINARY_DIR}/pykdConfig.cmake" "${PROJECT_BINARY_DIR}/pykdConfigVersion.cmake"
              cmake/FindLibTorch.cmake
        DESTINATION ${_package} COMPONENT sdk)
install(EXPORT pykdTargets NAMESPACE pykd:: DESTINATION ${_package} COMPONENT sdk)

# From the build folder: -Dpykd_DIR=<build folder>.
export(EXPORT pykdTargets NAMESPACE pykd:: FILE "${PROJECT_BINARY_DIR}/pykdTargets.cmake")
configure_file(cmake/FindLibTorch.cmake "${PROJECT_BINARY_DIR}/FindLibTorch.cmake" COPYONLY)
