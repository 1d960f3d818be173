# How others find pykd, in a prefix, in a wheel and in this build: find_package(pykd), pkg-config, and the name by which
# programs load libpykd. Included by CMakeLists.txt.
#
# In a wheel (scikit-build-core) everything lies in site-packages/pykd: _core…so, include/, lib/.
include(CMakePackageConfigHelpers)

# Programs ask for libpykd.so.<version of the interface>, so that they never load one of another interface.
file(STRINGS "${PROJECT_SOURCE_DIR}/cpp/include/pykd/pykd.h" _abi REGEX "^#define PYKD_ABI_VERSION [0-9]+")
string(REGEX MATCH "[0-9]+" _abi "${_abi}")
if(SKBUILD)
  set(CMAKE_INSTALL_LIBDIR lib)
  set(CMAKE_INSTALL_INCLUDEDIR include)
  set_target_properties(pykd PROPERTIES VERSION ${_abi} SOVERSION ${_abi})
else()
  set_target_properties(pykd PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${_abi})
endif()
set(_package ${CMAKE_INSTALL_LIBDIR}/cmake/pykd)

write_basic_package_version_file("${PROJECT_BINARY_DIR}/pykdConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/pykdConfig.cmake.in" "${PROJECT_BINARY_DIR}/pykdConfig.cmake"
                              INSTALL_DESTINATION ${_package} NO_SET_AND_CHECK_MACRO)

# From the build folder: -Dpykd_DIR=<build folder>.
export(TARGETS pykd NAMESPACE pykd:: FILE "${PROJECT_BINARY_DIR}/pykdTargets.cmake")
foreach(_module FindLibTorch FindHighway)
  configure_file("${PROJECT_SOURCE_DIR}/cmake/${_module}.cmake" "${PROJECT_BINARY_DIR}/${_module}.cmake" COPYONLY)
endforeach()

if(NOT PYKD_INSTALL)
  return()
endif()

# ---- What is installed --------------------------------------------------------------------------
set(_link "")
if(SKBUILD)
  set(_link NAMELINK_SKIP)  # wheels cannot hold links
endif()
install(TARGETS pykd EXPORT pykdTargets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT sdk ${_link}
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT sdk
        INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(SKBUILD)
  # This says to the linker what a link would (-lpykd).
  file(WRITE "${PROJECT_BINARY_DIR}/libpykd.so.script" "INPUT(libpykd.so.${_abi})\n")
  install(FILES "${PROJECT_BINARY_DIR}/libpykd.so.script" DESTINATION ${CMAKE_INSTALL_LIBDIR} RENAME libpykd.so
          COMPONENT sdk)
endif()
# Opened at run time by libpykd, so no targets are exported for them.
foreach(_target pykd_torch pykd_torch_ops pykd_cuda)
  if(TARGET ${_target})
    install(TARGETS ${_target} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT sdk)
  endif()
endforeach()
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
install(DIRECTORY "${PROJECT_SOURCE_DIR}/cpp/include/pykd" DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT sdk)
if(TARGET _core AND SKBUILD)
  install(TARGETS _core LIBRARY DESTINATION . COMPONENT python)
endif()
install(FILES "${PROJECT_BINARY_DIR}/pykdConfig.cmake" "${PROJECT_BINARY_DIR}/pykdConfigVersion.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/FindLibTorch.cmake" "${PROJECT_SOURCE_DIR}/cmake/FindHighway.cmake"
        DESTINATION ${_package} COMPONENT sdk)
install(EXPORT pykdTargets NAMESPACE pykd:: DESTINATION ${_package} COMPONENT sdk)

# pkg-config finds everything from where pykd.pc itself lies, so that the folder may be moved.
set(PYKD_PC_LIBDIR "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
set(PYKD_PC_INCLUDEDIR "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
  set(PYKD_PC_PREFIX "${CMAKE_INSTALL_PREFIX}")
  set(PYKD_PC_LIBDIR "${CMAKE_INSTALL_LIBDIR}")
else()
  file(RELATIVE_PATH PYKD_PC_PREFIX "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
  string(PREPEND PYKD_PC_PREFIX "\${pcfiledir}/")
endif()
if(IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
  set(PYKD_PC_INCLUDEDIR "${CMAKE_INSTALL_INCLUDEDIR}")
endif()
set(PYKD_PC_LIBS "-lpykd")
if(PYKD_STATIC)  # and what it needs
  string(APPEND PYKD_PC_LIBS " -lhwy -lz -lstdc++ -lm -ldl -pthread")
endif()
configure_file(cmake/pykd.pc.in "${PROJECT_BINARY_DIR}/pykd.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/pykd.pc" DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT sdk)
