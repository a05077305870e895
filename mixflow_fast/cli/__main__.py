import sys

from mixflow_fast.cli.main import main

sys.exit(main())
