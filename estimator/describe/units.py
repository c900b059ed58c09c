"""Base units inside are bytes, seconds and joules; these are what others are made of."""

GIB = 2**30
SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 24 * SECONDS_PER_HOUR
SECONDS_PER_YEAR = 365.25 * SECONDS_PER_DAY  # the Julian year
JOULES_PER_KILOWATT_HOUR = 3.6e6  # 1,000 W x 3,600 s
