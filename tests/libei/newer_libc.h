/* What a libei out of a newer Debian calls, where the libc is older than 2.38 and does not have it. Goes in front. */
#include <stdlib.h>
#if defined(__GLIBC__) && __GLIBC__ == 2 && __GLIBC_MINOR__ < 38
#include <stdarg.h>
#include <stdio.h>

int __isoc23_sscanf(const char *text, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int read = vsscanf(text, format, arguments);
    va_end(arguments);
    return read;
}

long __isoc23_strtol(const char *text, char **end, int base)
{
    return strtol(text, end, base);
}
#endif
