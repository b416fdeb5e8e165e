// The macros that Python's headers need for 64-bit Windows, used only by packaging/check_targets.sh. Only this one of
// Python's headers depends on the system, and the installed one is for another system. No build includes it.
#define MS_WINDOWS
#define MS_WIN64
#define HAVE_DECLSPEC_DLL
#define HAVE_PY_SSIZE_T 1
#define HAVE_STDDEF_H
#define PY_SSIZE_T_MAX LLONG_MAX
#define SIZEOF_FPOS_T 8
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_TIME_T 8
#define SIZEOF_VOID_P 8
#define SIZEOF_WCHAR_T 2
typedef long long Py_ssize_t;
