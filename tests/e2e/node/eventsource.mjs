// npm's eventsource, told of on stdout: one JSON object for each of its events.
// usage: eventsource.mjs URL
import { createRequire } from 'node:module';

const require = createRequire(process.env.MYTHOS_NODE_MODULES + '/');
const { EventSource } = require('eventsource');

const tell = (event, fields = {}) => process.stdout.write(JSON.stringify({ event, ...fields }) + '\n');

const source = new EventSource(process.argv[2]);
source.addEventListener('open', () => tell('open'));
source.addEventListener('message', (event) => tell('message', { id: event.lastEventId || null, data: event.data }));
source.addEventListener('error', (event) =>
  tell('error', { code: event.code ?? null, message: event.message ?? null, state: source.readyState }),
);
// A client that has given up stays, so that a test can see that nothing more comes; the test ends it.
process.stdin.resume();
